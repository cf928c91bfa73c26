"""What begins on disk: a checkpoint, and real text."""

import argparse
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from gemma_jax.benchmark.device import peak_bytes
from gemma_jax.benchmark.records import (
    Figure,
    figure_name,
    label,
    model_name,
    with_plain_memory,
)
from gemma_jax.benchmark.running import is_int8
from gemma_jax.cache import keep_compiled_programs
from gemma_jax.errors import InputError


def load(options: argparse.Namespace) -> Iterator[Figure]:
    """From a checkpoint on disk to parameters on the device, with its hashes compared.

    The first time may read from the disk, later ones read what the system keeps in memory.
    """
    import jax

    from gemma_jax.checkpoint import store

    times, size = [], 0
    for _ in range(options.repeats):
        start = time.perf_counter()
        model = store.load(options.model)
        jax.block_until_ready(model.params)
        times.append(time.perf_counter() - start)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
        config, quantized = with_plain_memory(model.config), is_int8(model.params)
        name = figure_name("load", config, quantized=quantized)
        del model
    yield f"{name}_seconds", "s", times
    yield f"{name}_rate", "GB/s", [size / s / 1e9 for s in times]
    if peak := peak_bytes():
        yield f"{name}_peak_bytes", "bytes", [peak]


def read(options: argparse.Namespace) -> Iterator[Figure]:
    """Real text to the first token of an answer, and what of that is not tokenising.

    The reader is the one of run.py. Compiling and loading are not counted.
    """
    from gemma_jax.checkpoint import store
    from gemma_jax.inference.prefill import piece_sizes

    keep_compiled_programs()
    model = store.load(options.model, memory=options.memory)
    tokens = options.tokens
    name = f"{model_name(model.config)}_{label(tokens)}"
    start = time.perf_counter()
    first_token(model, [[model.config.bos_id] * (piece_sizes(model.config)[1] + 1)])
    yield f"{name}_compile_seconds", "s", [time.perf_counter() - start]
    alone, whole = [], []
    for _ in range(options.repeats):
        start = time.perf_counter()
        for _ in text_ids(model, options.text, tokens):
            pass
        alone.append(time.perf_counter() - start)
        start = time.perf_counter()
        read_tokens = first_token(model, text_ids(model, options.text, tokens))
        whole.append(time.perf_counter() - start)
        assert read_tokens == tokens
    yield f"{name}_seconds_tokenizing", "s", alone
    yield f"{name}_seconds_to_first_token", "s", whole
    yield f"{name}_tokens_per_second", "tokens/s", [tokens / s for s in whole]
    beyond = [b - a for a, b in zip(alone, whole, strict=True)]
    yield f"{name}_seconds_beyond_tokenizing", "s", beyond
    if peak := peak_bytes():
        yield f"{name}_peak_bytes", "bytes", [peak]


def first_token(model: Any, ids: Iterable[Sequence[int]]) -> int:
    """Reads a text and writes one token; returns how many tokens were read, by the State's count."""
    from gemma_jax.inference.reader import read, write
    from gemma_jax.inference.sampling import Greedy

    reading = read(model, ids)
    count = int(reading.state.length[0])
    next(write(model, reading, max_new_tokens=1, sampling=Greedy()))
    return count


def text_ids(model: Any, files: Sequence[str], tokens: int) -> Iterator[Sequence[int]]:
    """BOS and the files' first tokens, `tokens` in all, as they are tokenised.

    Raises:
        InputError: the files have fewer.
    """
    from gemma_jax.inference.documents import Documents
    from gemma_jax.text import encode_prompt

    left = tokens
    for some in encode_prompt(model.tokenizer, Documents(files), bos_id=model.config.bos_id):
        yield some[:left]
        left -= len(some)
        if left <= 0:
            return
    raise InputError(
        f"The files of --text have only {tokens - left} tokens: name more of them, or fewer --tokens."
    )
