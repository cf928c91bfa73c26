"""How fast and how large: `python -m gemma_jax.benchmark prefill --preset gemma-2b --tokens 1M`.

Reads fresh random tokens, or decodes after them, with random weights of a published shape (or a
converted model), through the functions that `run.py` uses. What the device does at best is measured
in the same run, last, so that peak memory is that of the model.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import shlex
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemma_jax.config import PRESETS, GemmaConfig

MATMUL_SIZES = (4096, 8192, 16_384)
COPY_BYTES = 2**32
PACKAGES = ("jax", "jaxlib", "flax")


@dataclasses.dataclass(frozen=True)
class Record:
    """One figure, as it stands in the files of `benchmarks/`."""

    name: str
    value: float
    unit: str
    command: str
    device: str
    versions: dict[str, str]
    date: str
    repeats: list[float]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    options = parse(arguments)
    from gemma_jax.inference.console import run_command

    return run_command(lambda: benchmark(options), debug=options.debug)


def benchmark(options: argparse.Namespace) -> None:
    """Prints a table of figures, and writes them to `--output`."""
    config, params = load(options)
    kinds = {"prefill": prefill, "decode": decode}
    records = []
    for name, unit, repeats in (*kinds[options.what](options, config, params), *ceilings()):
        value = statistics.median(repeats)
        spread = f"  ({min(repeats):,.4g} to {max(repeats):,.4g})" if len(repeats) > 1 else ""
        print(f"{name:<44} {value:>16,.4g} {unit}{spread}", flush=True)
        records.append(make_record(name, value, unit, repeats))
    if options.output:
        append(Path(options.output), records)


Figure = tuple[str, str, list[float]]  # name, unit, repeats


def ceilings() -> Iterator[Figure]:
    """What the device does at best: the fastest of some matrix products, and a copy."""
    import jax
    import jax.numpy as jnp

    if jax.default_backend() == "cpu":
        return
    rates = []
    for size in MATMUL_SIZES:
        x = jnp.ones((size, size), jnp.bfloat16)
        product = jax.jit(jnp.matmul)
        rates.append([2 * size**3 / s / 1e12 for s in seconds(lambda x=x, f=product: f(x, x), 20)])
    yield "matmul_ceiling", "TFLOP/s", max(rates, key=statistics.median)
    x = jnp.zeros(COPY_BYTES // 4, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    yield "copy_ceiling", "GB/s", [2 * COPY_BYTES / s / 1e9 for s in seconds(lambda: copy(x), 20)]


def seconds(call: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each call, after two that are not counted."""
    import jax

    jax.block_until_ready([call(), call()])
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        found.append(time.perf_counter() - start)
    return found


def prefill(options: argparse.Namespace, config: GemmaConfig, params: Any) -> Iterator[Figure]:
    """Reading: all tokens given are read, in pieces of one shape."""
    import jax

    from gemma_jax.inference.prefill import default_chunk_tokens
    from gemma_jax.inference.prefill import prefill as read
    from gemma_jax.model.state import init_state

    chunk = options.chunk_tokens or default_chunk_tokens(config)
    rng = np.random.default_rng(0)

    def pieces(count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in range(0, count, chunk):
            tokens = rng.integers(0, config.vocab_size, (1, chunk), dtype=np.int32)
            yield tokens, np.array([min(chunk, count - start)], np.int32)

    def run(count: int) -> float:
        """Seconds to read `count` tokens."""
        state, waiting = init_state(config), []
        start = time.perf_counter()
        for tokens, lengths in pieces(count):
            logits, state = read(
                params, tokens, state, config=config, lengths=lengths, chunk_tokens=chunk
            )
            waiting.append(logits)
            if len(waiting) > 2:
                waiting.pop(0).block_until_ready()
        assert np.isfinite(np.asarray(logits)).all()
        elapsed = time.perf_counter() - start
        assert int(state.length[0]) == count
        return elapsed

    start = time.perf_counter()
    run(chunk)
    yield "compile_and_first_chunk", "s", [time.perf_counter() - start]
    run(4 * chunk)
    rates = [options.tokens / run(options.tokens) for _ in range(options.repeats)]
    yield f"prefill_{options.tokens}_tokens_per_second", "tokens/s", rates
    flops = dense_flops(config)
    yield "prefill_dense", "TFLOP/s", [rate * flops / 1e12 for rate in rates]
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        yield "peak_bytes", "bytes", [stats["peak_bytes_in_use"]]


def decode(options: argparse.Namespace, config: GemmaConfig, params: Any) -> Iterator[Figure]:
    """Writing after a text of `--tokens` tokens: LM head and sampling included."""
    import jax

    from gemma_jax.inference.decode import decode_block
    from gemma_jax.inference.prefill import default_chunk_tokens
    from gemma_jax.inference.prefill import prefill as read
    from gemma_jax.inference.sampling import Greedy
    from gemma_jax.model.state import init_state

    batch, chunk = options.batch_size, options.chunk_tokens or default_chunk_tokens(config)
    rng, state = np.random.default_rng(0), init_state(config, options.batch_size)
    for start in range(0, options.tokens, chunk):
        tokens = rng.integers(0, config.vocab_size, (batch, chunk), dtype=np.int32)
        lengths = np.full(batch, min(chunk, options.tokens - start), np.int32)
        logits, state = read(
            params, tokens, state, config=config, lengths=lengths, chunk_tokens=chunk
        )

    def block() -> None:
        nonlocal logits, state
        _, _, logits, state = decode_block(
            params,
            logits,
            state,
            config=config,
            sampling=Greedy(),
            key=jax.random.key(0),
            num_tokens=options.new_tokens,
        )
        jax.block_until_ready(logits)

    rates = [batch * options.new_tokens / s for s in seconds(block, max(options.repeats, 3))]
    yield f"decode_b{batch}_tokens_per_second", "tokens/s", rates
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    yield "decode_weights_read", "GB/s", [rate / batch * size / 1e9 for rate in rates]


def dense_flops(config: GemmaConfig) -> float:
    """Floating-point operations of the matrix products of one token, without LM head and attention."""
    attention = 2 * config.width * (config.num_heads + config.num_kv_heads) * config.head_dim
    return 2.0 * config.num_layers * (attention + 3 * config.width * config.mlp_dim)


def load(options: argparse.Namespace) -> tuple[GemmaConfig, Any]:
    """A converted model, or random weights made on the device, with live memory gates."""
    import jax

    changes = {
        "rule": options.memory,
        "segment_length": options.segment_length,
        "local_attention": options.local_attention,
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    if options.model:
        from gemma_jax.checkpoint import store

        model = store.load(options.model, memory=options.memory)
        return model.config.with_memory(**changes), model.params
    from gemma_jax.model.transformer import init_params

    config = PRESETS[options.preset].with_memory(**changes)
    params = jax.jit(lambda key: init_params(config, key))(jax.random.key(0))

    def open_gates(path: tuple[Any, ...], leaf: Any) -> Any:
        name = jax.tree_util.keystr(path)
        if "'memory'" not in name:
            return leaf
        key = jax.random.key(zlib.crc32(name.encode()))
        return 0.5 * jax.random.normal(key, leaf.shape, leaf.dtype)

    return config, jax.tree.map_with_path(open_gates, params)


def make_record(name: str, value: float, unit: str, repeats: list[float]) -> Record:
    import jax

    return Record(
        name=name,
        value=value,
        unit=unit,
        command=shlex.join(["python", "-m", "gemma_jax.benchmark", *sys.argv[1:]]),
        device=jax.local_devices()[0].device_kind,
        versions={package: importlib.metadata.version(package) for package in PACKAGES},
        date=datetime.date.today().isoformat(),
        repeats=repeats,
    )


def append(path: Path, records: list[Record]) -> None:
    """Adds records to a JSON file; those of the same name and command are replaced."""
    old = json.loads(path.read_text()) if path.exists() else []
    new = [dataclasses.asdict(record) for record in records]
    names = {(record["name"], record["command"]) for record in new}
    kept = [record for record in old if (record["name"], record["command"]) not in names]
    path.write_text(json.dumps([*kept, *new], indent=1) + "\n")


def count(text: str) -> int:
    """`10M` is ten million, `8K` is 8,192."""
    scale = {"K": 1024, "M": 1_000_000}.get(text[-1:].upper(), 1)
    number = int(float(text[: -1 if scale > 1 else None]) * scale)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is out of range: it must be at least 1")
    return number


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    from gemma_jax.inference.console import ArgumentParser, number

    parser = ArgumentParser(
        prog="python -m gemma_jax.benchmark", description="Measures reading and writing."
    )
    parser.add_argument("what", choices=("prefill", "decode"))
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--preset", choices=tuple(PRESETS), help="random weights of this shape")
    which.add_argument("--model", metavar="DIR", help="a checkpoint")
    parser.add_argument("--tokens", metavar="N", type=count, default=100_000, help="e.g. 10M")
    parser.add_argument(
        "--new-tokens", metavar="N", type=number(int)(1), default=64, help="of a block"
    )
    parser.add_argument("--batch-size", metavar="B", type=number(int)(1), default=1)
    parser.add_argument("--chunk-tokens", metavar="N", type=count)
    parser.add_argument("--memory", metavar="RULE")
    parser.add_argument("--segment-length", metavar="S", type=number(int)(1))
    parser.add_argument("--local-attention", choices=("transformer_xl", "segment"))
    parser.add_argument("--repeats", metavar="N", type=number(int)(1), default=3)
    parser.add_argument("--output", metavar="FILE", help="adds records to this JSON file")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    from gemma_jax.inference.console import leave

    leave(main())
