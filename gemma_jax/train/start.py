"""What a run starts from: a model that exists, or one from scratch."""

import argparse
import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from gemma_jax import tasks
from gemma_jax.checkpoint import store
from gemma_jax.config import PRESETS, GemmaConfig
from gemma_jax.errors import InputError, UsageError
from gemma_jax.inference.documents import read_text
from gemma_jax.model.adapting import is_memory
from gemma_jax.model.memory import RULES, make_rule
from gemma_jax.model.transformer import Params, init_params
from gemma_jax.text import load_tokenizer
from gemma_jax.train.tokenizer import learn_tokenizer, save_tokenizer

DEFAULT_RULE = "selective_delta"
NEW = "new:"  # and a number of tokens, in place of a tokenizer's directory
INIT_SPREAD = 0.02  # of `init_params`, at any width
ENDS_OF_BRANCHES = ("out", "down")  # matrices whose products are added to the residual stream

Tell = Callable[[str, int | None, int | None], None]


def make_model(
    options: argparse.Namespace, texts: Sequence[Path], directory: Path, tell: Tell
) -> tuple[GemmaConfig, Params, Any, Path]:
    """Configuration, parameters, tokenizer, and the directory the tokenizer came from.

    Args:
        options: of the command line.
        texts: what a new tokenizer is learnt from; it has the words that tasks are answered with.
        directory: of the run, where it is kept.
        tell: is told what takes long.
    """
    settings = {
        name: getattr(options, name)
        for name in ("segment_length", "local_attention", "write_gate", "slots", "neighbours")
    }
    settings = {name: value for name, value in settings.items() if value is not None}
    if options.model:
        recorded = store.read_config(options.model, memory=options.memory)
        rule = options.memory or recorded.memory.rule
        rule = DEFAULT_RULE if rule == "off" and not options.memory else rule
        config = with_memory(recorded, rule, settings)
        if config.quantized and options.train != "memory":
            raise UsageError(
                f"{options.model} is quantised, so only its memory can be trained: convert it without"
                " --quantize for --train " + options.train + "."
            )
        require_parameters(options, config)
        if options.train == "all" and options.update_scale != 1.0 and rule != recorded.memory.rule:
            raise UsageError(
                f"{options.model} has no memory of rule {rule}, and --update-scale would go back towards"
                " one that was taught nothing: leave it out."
            )
        model = store.load(options.model, memory=rule, dtype=options.dtype)
        config = dataclasses.replace(model.config, memory=config.memory)
        return config, model.params, model.tokenizer, model.path
    config = PRESETS[options.preset] if options.preset else read_config(Path(options.config))
    rule = options.memory or (config.memory.rule if options.config else DEFAULT_RULE)
    config = with_memory(config, rule, settings)
    config = dataclasses.replace(config, dtype=options.dtype or config.dtype, quantization=None)
    make_rule(config)
    if options.tokenizer.startswith(NEW):
        home = directory / "tokenizer"
        if not (home / "tokenizer.json").is_file():
            tell("learning a tokenizer", 0, None)
            content = itertools.chain.from_iterable(map(read_text, map(str, texts)))
            size, words = new_size(options.tokenizer), answer_words(options)
            save_tokenizer(learn_tokenizer(content, size, words), home)
    else:
        home = Path(options.tokenizer)
    tokenizer = load_tokenizer(home)
    if len(tokenizer) > config.vocab_size:
        raise InputError(
            f"The tokenizer of {home} has {len(tokenizer)} tokens, and the model's vocabulary"
            f" {config.vocab_size}: choose a tokenizer or a --config that belong together."
        )
    params = jax.jit(fresh_params, static_argnums=0)(config, jax.random.key(options.seed))
    return config, params, tokenizer, home


def with_memory(config: GemmaConfig, rule: str, settings: dict[str, Any]) -> GemmaConfig:
    """The configuration with another memory.

    Raises:
        UsageError: slots or neighbours are asked for, and the rule is one of ours without slots.
    """
    for name in ("slots", "neighbours"):
        if name in settings and rule in RULES and rule != "slots":
            raise UsageError(
                f"Memory rule {rule} has no slots: leave out --{name}, or ask for --memory slots."
            )
    return config.with_memory(rule=rule, **settings)


def new_size(tokenizer: str) -> int:
    """The SIZE of `new:SIZE`.

    Raises:
        UsageError: it is no number.
    """
    try:
        return int(tokenizer.removeprefix(NEW))
    except ValueError:
        raise UsageError(
            f"--tokenizer {tokenizer} has no number of tokens: write e.g. {NEW}4096."
        ) from None


def answer_words(options: argparse.Namespace) -> list[str]:
    """All words of the closed sets that answers of the tasks in `--data` come from."""
    found = [tasks.make(what, keys="train") for kind, what, _ in options.data if kind == "task"]
    return list(dict.fromkeys(word for task in found for word in task.vocabulary))


def read_config(file: Path) -> GemmaConfig:
    """A `GemmaConfig` as `to_json` writes it."""
    try:
        return GemmaConfig.from_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{file} cannot be read ({error.strerror}): name a GemmaConfig."
        ) from error


def require_parameters(options: argparse.Namespace, config: GemmaConfig) -> None:
    """Raises `UsageError` when a rule has nothing that could be trained."""
    if options.train == "memory" and not make_rule(config).params():
        raise UsageError(
            f"Memory rule {config.memory.rule} has no parameters to train: choose another --memory, or"
            " --train all."
        )


def fresh_params(config: GemmaConfig, key: Array) -> Params:
    """Random float32 parameters that small models learn from faster than from `init_params`.

    Matrices are N(0, 1 / inputs), so that what goes through them keeps its size at any width; those at
    the end of a residual branch are smaller by sqrt(2 layers) (Radford et al. 2019, section 2.3). Delta
    memories are read from the start: nothing has been learnt yet that they could disturb.
    """

    def scaled(path: tuple[Any, ...], leaf: Array) -> Array:
        leaf = leaf.astype(jnp.float32)
        if is_memory(path):
            is_read_gate = path[-1].key == "gate" and config.memory.rule.endswith("_delta")
            return jnp.ones_like(leaf) if is_read_gate else leaf
        if leaf.ndim < 2:
            return leaf
        spread = leaf.shape[1] ** -0.5
        if path[-1].key in ENDS_OF_BRANCHES:
            spread /= math.sqrt(2 * config.num_layers)
        return leaf * (spread / INIT_SPREAD)

    return jax.tree.map_with_path(scaled, init_params(config, key))
