"""The sentences that `run.py` says about a model, its memory and what was read."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

from gemma_jax.config import GemmaConfig
from gemma_jax.inference.console import size

SMALL_MODEL = (
    "no --model was given: the small model of gemma_jax answers, which knows how to recall what it read"
    " and little else. Name a checkpoint of convert_weights.py with --model for real answers."
)


def memory_needed(config: GemmaConfig) -> str:
    """What loading and reading will take, said before anything is loaded."""
    from gemma_jax.model.state import state_bytes

    return (
        f"{config.name}: {size(weight_bytes(config))} of weights and {size(state_bytes(config))}"
        " of State will be held; this does not grow with the length of the text."
    )


def weight_bytes(config: GemmaConfig) -> int:
    """Size of the weights in memory."""
    attention = 2 * config.width * (config.num_heads + config.num_kv_heads) * config.head_dim
    norms = (4 if config.post_norms else 2) * config.width
    norms += 2 * config.head_dim if config.qk_norm else 0
    layer = attention + 3 * config.width * config.mlp_dim + norms
    embeddings = (1 if config.tied_embeddings else 2) * config.vocab_size * config.width
    parameters = embeddings + config.num_layers * layer + config.width
    return parameters * (2 if config.dtype == "bfloat16" else 4)


def forgotten(config: GemmaConfig, tokens: int) -> str | None:
    """The warning that a text is longer than a model without memory can see, if it is."""
    if config.memory.rule != "off" or tokens <= config.memory.reach:
        return None
    return (
        f"the text is longer than the {config.memory.reach} tokens that local attention reaches,"
        " and memory is off (none was trained for this model): all of it is read, but the answer"
        " knows only about the last part. Put the question and what it is about last, or raise"
        " --segment-length."
    )


def untrained(recorded: GemmaConfig, rule: str | None) -> str | None:
    """The warning that a memory rule is asked for that was not trained, if it is."""
    if rule in (None, "off", recorded.memory.rule):
        return None
    return (
        f"memory rule {rule} was not trained for this model (it records {recorded.memory.rule}):"
        " it starts from fresh parameters, and cannot be expected to recall anything."
    )


def ready(seconds: float) -> str:
    """How long it took until there was a model that can read and write."""
    return f"loaded in {seconds:.1f} s"


def replaced(characters: int) -> str | None:
    """The warning that some bytes were not UTF-8, if there were any."""
    return f"{characters} places were not UTF-8 and were read as U+FFFD." if characters else None


def summary(answer: Any) -> str:
    """The closing line: how much was read and written, and how fast."""
    report, first = answer.report(), answer.first_token_seconds
    prefill, decode = report["prefill_tokens_per_second"], report["decode_tokens_per_second"]
    return (
        f"read {report['prompt_tokens']} of {answer.given_tokens} tokens{_speed(prefill)},"
        f" wrote {len(report['tokens'])}{_speed(decode)}"
        + ("" if first is None else f", the first after {first:.2f} s")
    )


def _speed(rate: float | None) -> str:
    return "" if rate is None else f" ({rate:.0f} tokens/s)"


def saved(path: Any, memory: Any) -> str:
    """What a memory file holds that was just written."""
    return (
        f"{memory.tokens} tokens are kept in {path} ({size(os.stat(path).st_size)}); ask again with"
        f" --load-memory {path}"
    )


def loaded(path: Any, memory: Any) -> str:
    """What a memory file held that was just loaded."""
    sources = (*memory.sources, *(memory.unread.sources if memory.unread else ()))
    names = ", ".join(dict.fromkeys(source.name for source in sources))
    return (
        f"{memory.tokens} tokens were read before ({', '.join(filter(None, (names, str(path))))})"
    )


def conversation(config: GemmaConfig, chat: Any) -> str:
    """How much was said, how fast, and what it takes."""
    from gemma_jax.model.state import state_bytes

    last = chat.last
    return (
        f"{chat.turns} answers, {chat.memory.tokens} tokens in a State of {size(state_bytes(config))};"
        f" last: read {last.read}{_speed(last.read_per_second)},"
        f" wrote {last.written}{_speed(last.written_per_second)}"
    )


def batch(failed: Sequence[bool]) -> str:
    """The closing line of many prompts, by which of them failed."""
    text = f"{failed.count(False)} prompts answered"
    return text + (f", {failed.count(True)} could not be" if any(failed) else "")


def converted(conversion: Any, dest: str) -> Iterator[str]:
    """What a conversion did, line by line."""
    config = conversion.config
    head = "tied to the embedding" if config.tied_embeddings else "of its own"
    yield (
        f"{config.name}: {conversion.parameters:,} parameters, {config.num_layers} layers, head"
        f" {head}, memory rule {config.memory.rule}."
    )
    if conversion.skipped:
        vision = sum("vision" in name or "projector" in name for name in conversion.skipped)
        what = "the vision tower" if vision else "derived tensors"
        yield f"skipped {what}: {len(conversion.skipped)} tensors ({conversion.skipped[0]}, ...)."
    yield from (f"note: {notice}" for notice in conversion.notices)
    if (found := conversion.verification) is not None:
        yield (
            f"verified against Hugging Face transformers over {found.tokens} tokens: maximum KL"
            f" {found.max_kl:.2g} nats, top-5 agreement {found.top5_agreement:.1%}."
        )
    yield f"written to {dest}."
