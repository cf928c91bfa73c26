"""The command: what to ask of which model, and where the answers go."""

import argparse
import dataclasses
import functools
import hashlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemma_jax.config import PRESETS, GemmaConfig
from gemma_jax.errors import InputError, UsageError
from gemma_jax.evaluate import plan as planning
from gemma_jax.evaluate.haystack import reach
from gemma_jax.evaluate.journal import Journal
from gemma_jax.evaluate.options import parse


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    from gemma_jax.evaluate import perplexity
    from gemma_jax.inference.console import run_command

    arguments = sys.argv[1:] if arguments is None else arguments
    of_a_text = any(a == "--text" or a.startswith("--text=") for a in arguments)
    options = (perplexity.parse if of_a_text else parse)(arguments)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    run = perplexity.evaluate if of_a_text else evaluate
    return run_command(lambda: run(options), debug=options.debug)


def evaluate(options: argparse.Namespace) -> None:
    """Runs a grid, or what is left of it, and tells what came of it.

    Raises:
        GemmaError: some trials failed; everything else is written all the same.
    """
    from gemma_jax.benchmark import records
    from gemma_jax.cache import keep_compiled_programs
    from gemma_jax.evaluate import report
    from gemma_jax.inference.console import Console

    console = Console(quiet=options.quiet, debug=options.debug)
    subject = check(options)
    if options.record:
        file = Path(options.record).absolute()
        if file.exists():
            records.read(file, report.Recall)
        elif not file.parent.is_dir():
            raise InputError(f"{file.parent} is not a directory: choose another --record.")
    journal = Journal(Path(options.output), subject.settings, must_exist=options.resume)
    console.line(subject.describe())
    keep_compiled_programs()
    within = reach(subject.config)
    if options.peer:
        run_peer(subject, journal, console, within)
    run_ours(subject, journal, console, within)
    report.report(subject, journal)
    console.line(f"everything is in {options.output}")


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is evaluated, and on what: everything that is known before anything is loaded."""

    options: argparse.Namespace
    config: GemmaConfig
    tokenizer: Any
    grid: planning.Grid
    settings: dict[str, Any]  # what the trials depend on
    tasks: tuple[Any, ...]

    @property
    def names(self) -> list[str]:
        """The settings that are compared."""
        off = ["off"] if self.options.baseline and self.config.memory.rule != "off" else []
        return ["ours", *off, *(["hf"] if self.options.peer else [])]

    def describe(self) -> str:
        """The grid in one line."""
        haystacks = list(self.grid.haystacks)
        trials, tokens = sum(len(h.asked) for h in haystacks), sum(h.tokens for h in haystacks)
        return (
            f"{trials} trials in {len(haystacks)} haystacks of {tokens:,} tokens in all, for each"
            f" of: {', '.join(self.names)}"
        )


def check(options: argparse.Namespace) -> Subject:
    """Plans everything, and raises what is wrong with it before anything long starts."""
    from gemma_jax import tasks
    from gemma_jax.checkpoint import store
    from gemma_jax.model.memory import make_rule
    from gemma_jax.tasks import haystacks
    from gemma_jax.text import encode_batch

    made = tuple(tasks.make(name, **task_options(options)) for name in options.task)
    config = read_config(options)
    make_rule(config)
    tokenizer = load_tokenizer(options)
    books = tuple(options.haystack or haystacks.shipped("held_out"))
    haystacks.check(books)
    if options.haystack and all(task.haystack != "books" for task in made):
        hidden = " and ".join(f"{task.name} is hidden in {task.haystack}" for task in made)
        raise UsageError(
            f"--haystack names books, but {hidden}: add --filler books, or choose other tasks."
        )
    if options.peer:
        require_peer(options)
    wanted = planning.Options(
        tasks=made,
        lengths=options.lengths,
        depths=tuple(depth / 100 for depth in options.depths),
        trials=options.trials,
        questions=options.questions or options.trials,
        haystacks=options.haystacks,
        shared=options.shared,
        seed=options.seed,
        books=books,
        rows=options.batch_size,
        beside=planning.rows_to_be_busy(config, options.batch_size),
    )
    grid = planning.plan(wanted, functools.partial(encode_batch, tokenizer), config.bos_id)
    model = Path(options.model) / store.MANIFEST if options.model else None
    settings = {
        name: getattr(wanted, name)
        for name in ("lengths", "depths", "trials", "questions", "haystacks", "shared", "seed")
    } | {
        "task": options.task,
        "batch_size": options.batch_size,
        "model": hash_of(str(model)) if model else options.preset,
        "dtype": config.dtype,
        "memory": dataclasses.asdict(config.memory),
        **task_options(options),
        "haystack": [hash_of(book) for book in books],
        "filler": options.filler,
        "tokenizer": options.tokenizer,
    }
    if options.adapter:
        settings["adapter"] = hash_of(str(Path(options.adapter) / store.MANIFEST))
    if options.peer:
        settings["peer_model"] = options.peer_model
    return Subject(options, config, tokenizer, grid, settings, made)


def task_options(options: argparse.Namespace) -> dict[str, Any]:
    """What the options say of the tasks themselves."""
    return {"forms": options.forms, "keys": options.keys, "haystack": options.filler}


def read_config(options: argparse.Namespace) -> GemmaConfig:
    """The configuration of what is evaluated; no weights are touched.

    Raises:
        UsageError: no model was named.
        InputError, CorruptError: `--model` names no checkpoint.
    """
    from gemma_jax.checkpoint import store

    if not (options.model or options.preset):
        raise UsageError(
            "There is nothing to evaluate: name a checkpoint with --model DIR, or a published shape"
            " with --preset NAME."
        )
    if options.tokenizer and not options.preset:
        raise UsageError("--tokenizer belongs to --preset: a checkpoint has its own.")
    if options.adapter and not options.model:
        raise UsageError("--adapter belongs to a checkpoint: name it with --model DIR.")
    config = (
        store.read_config(options.model, memory=options.memory, adapter=options.adapter)
        if options.model
        else PRESETS[options.preset]
    )
    changes = {
        "rule": options.memory,
        "segment_length": options.segment_length,
        "local_attention": options.local_attention,
    }
    config = dataclasses.replace(config, dtype=options.dtype or config.dtype)
    return config.with_memory(**{k: v for k, v in changes.items() if v is not None})


def load_tokenizer(options: argparse.Namespace) -> Any:
    """The checkpoint's tokenizer; of a preset the one that is named, or a tiny one."""
    from gemma_jax.text import load_tokenizer

    if options.model or options.tokenizer:
        return load_tokenizer(options.model or options.tokenizer)
    import transformers

    from gemma_jax.random_model import make_tokenizer

    return transformers.PreTrainedTokenizerFast(tokenizer_object=make_tokenizer())


def load_model(subject: Subject) -> Any:
    """The model with its weights; of a preset, random ones with every memory gate open."""
    from gemma_jax.checkpoint import store

    options, config = subject.options, subject.config
    if options.preset:
        from gemma_jax.benchmark.running import random_params

        return store.Model(config, random_params(config), subject.tokenizer, Path())
    model = store.load(
        options.model, memory=options.memory, dtype=options.dtype, adapter=options.adapter
    )
    return dataclasses.replace(model, config=config)


def require_peer(options: argparse.Namespace) -> None:
    """Raises where `--peer hf` cannot run."""
    from gemma_jax.benchmark import peer

    if not options.peer_model:
        raise UsageError("--peer hf needs the model as Hugging Face has it: --peer-model HF_DIR.")
    if not (Path(options.peer_model) / "config.json").is_file():
        raise InputError(
            f"{options.peer_model} has no config.json: name a Hugging Face directory with"
            " --peer-model."
        )
    peer.require()


def run_peer(subject: Subject, journal: Journal, console: Any, within: int) -> None:
    """The peer first: its process is gone, and its memory free, before ours takes the device."""
    from gemma_jax.evaluate import peer
    from gemma_jax.text import end_of_turn_ids

    config, options = subject.config, subject.options
    ends = end_of_turn_ids(subject.tokenizer, config.bos_id)
    with peer.Peer(options.peer_model, subject.tokenizer, (*config.eos_ids, *ends)) as found:
        peer.run_peer(subject.grid, found, options.peer_up_to, journal, console, within)


def run_ours(subject: Subject, journal: Journal, console: Any, within: int) -> None:
    """Our model, and beside it the same with memory off."""
    from gemma_jax.evaluate.grid import run, unfinished

    grid = subject.grid
    names = [name for name in subject.names if name != "hf"]
    if subject.options.baseline and "off" not in names:
        console.warning("the model's memory is off already: --baseline would be the same again.")
    if not any(unfinished(g, name, grid.rows, journal) for g in grid.groups for name in names):
        return
    from gemma_jax.evaluate.running import Reader, without_memory

    model = load_model(subject)
    models = {"ours": model, "off": without_memory(model)}
    readers = {
        name: Reader(models[name], grid.rows, grid.question_tokens, grid.beside) for name in names
    }
    import jax

    with jax.default_matmul_precision(
        "highest" if subject.config.dtype == "float32" else "default"
    ):
        run(grid, readers, journal, console, within)


def hash_of(path: str) -> str:
    """SHA-256 of a file."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): name another file.") from error
