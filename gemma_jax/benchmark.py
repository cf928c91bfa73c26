"""How fast and how large: `python -m gemma_jax.benchmark prefill decode --preset gemma-2b --tokens 1M`.

Reads fresh random tokens, and decodes after them, with random weights of a published shape (or a
converted model), through the functions that `run.py` uses. What the device does at best is measured
in the same run, before the model is there: a GPU that has worked for a minute slows down to stay cool.
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

from gemma_jax.cache import keep_compiled_programs
from gemma_jax.config import PRESETS, GemmaConfig

MATMUL_SIZES = (4096, 6144, 8192, 12_288)
COPY_BYTES = 2**28
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
    records: dict[str, Record] = {}

    def report(figures: Iterator[Figure]) -> None:
        for name, unit, repeats in figures:
            value = statistics.median(repeats)
            spread = f"  ({min(repeats):,.4g} to {max(repeats):,.4g})" if len(repeats) > 1 else ""
            print(f"{name:<48} {value:>14,.4g} {unit}{spread}", flush=True)
            records[name] = make_record(name, value, unit, repeats)

    report(ceilings())
    run = Run(options, *load(options))
    for what in options.what:
        report({"prefill": run.prefill, "decode": run.decode}[what]())
    report(shares(records))
    if options.output:
        append(Path(options.output), list(records.values()))


Figure = tuple[str, str, list[float]]  # name, unit, repeats


def ceilings() -> Iterator[Figure]:
    """What the device does at best: the fastest of some matrix products, and a copy."""
    import jax
    import jax.numpy as jnp

    if jax.default_backend() == "cpu":
        return
    calls, rates = 10, []  # in a row, so that the device never waits for the host
    for size in MATMUL_SIZES:
        # Random numbers: a GPU multiplies equal ones faster than any that a model holds.
        x = jax.random.normal(jax.random.key(size), (size, size), jnp.bfloat16)
        work, product = calls * 2 * size**3 / 1e12, jax.jit(jnp.matmul)
        rates.append([work / s for s in seconds(lambda x=x, f=product: f(x, x), 10, calls)])
    yield "matmul_ceiling", "TFLOP/s", max(rates, key=statistics.median)
    x = jnp.zeros(COPY_BYTES // 4, jnp.float32)
    copy, work = jax.jit(lambda x: x + 1), calls * 2 * COPY_BYTES / 1e9
    yield "copy_ceiling", "GB/s", [work / s for s in seconds(lambda: copy(x), 10, calls)]


def seconds(call: Callable[[], Any], repeats: int, calls: int = 1) -> list[float]:
    """Seconds of each round of `calls` calls, after one round and one call that are not counted."""
    import jax

    jax.block_until_ready([call() for _ in range(calls + 1)])
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready([call() for _ in range(calls)])
        found.append(time.perf_counter() - start)
    return found


def shares(records: dict[str, Record]) -> Iterator[Figure]:
    """What was reached, over what the device did at best in the same run."""
    for suffix, ceiling in (("_dense", "matmul_ceiling"), ("_weights_read", "copy_ceiling")):
        for name in [name for name in records if name.endswith(suffix) and ceiling in records]:
            best = records[ceiling].value
            found = [repeat / best for repeat in records[name].repeats]
            yield f"{name.removesuffix(suffix)}_ceiling_share", "1", found


@dataclasses.dataclass
class Run:
    """One model that reads and writes; what was read last is what is continued."""

    options: argparse.Namespace
    config: GemmaConfig
    params: Any
    reading: tuple[Any, Any] | None = None  # logits of what comes next, and State

    def prefill(self) -> Iterator[Figure]:
        """Reading: all tokens given are read, in pieces of one shape."""
        length, start = self.options.tokens, time.perf_counter()
        name = f"prefill_{label(length)}"
        name += "_segment" if self.config.memory.local_attention == "segment" else ""
        self._read(self._chunk)
        yield "compile_and_first_chunk", "s", [time.perf_counter() - start]
        before = min(100_000, length)
        self._read(before)
        peak_before = peak_bytes()
        total = length * self.options.batch_size
        rates = [total / self._read(length) for _ in range(self.options.repeats)]
        yield f"{name}_tokens_per_second", "tokens/s", rates
        dense = dense_flops(self.config) / 1e12
        yield f"{name}_dense", "TFLOP/s", [rate * dense for rate in rates]
        if peak := peak_bytes():
            yield f"{name}_peak_bytes", "bytes", [peak]
            yield f"peak_ratio_{label(length)}_{label(before)}", "1", [peak / peak_before]

    def decode(self) -> Iterator[Figure]:
        """Writing after a text of `--tokens` tokens: LM head and sampling included."""
        import jax

        from gemma_jax.inference.decode import decode_block
        from gemma_jax.inference.sampling import Greedy

        if self.reading is None:
            self._read(self.options.tokens)
        batch, new_tokens = self.options.batch_size, self.options.new_tokens

        def block() -> None:
            logits, state = self.reading
            _, _, logits, state = decode_block(
                self.params,
                logits,
                state,
                config=self.config,
                sampling=Greedy(),
                key=jax.random.key(0),
                num_tokens=new_tokens,
            )
            self.reading = jax.block_until_ready((logits, state))

        start = time.perf_counter()
        block()
        yield "compile_and_first_block", "s", [time.perf_counter() - start]
        rates = [batch * new_tokens / s for s in seconds(block, max(self.options.repeats, 8))]
        name = "decode" if batch == 1 else f"decode_b{batch}"
        yield f"{name}_tokens_per_second", "tokens/s", rates
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(self.params))
        yield f"{name}_weights_read", "GB/s", [rate / batch * size / 1e9 for rate in rates]
        if peak := peak_bytes():
            yield f"{name}_peak_bytes", "bytes", [peak]

    @property
    def _chunk(self) -> int:
        from gemma_jax.inference.prefill import default_chunk_tokens

        return self.options.chunk_tokens or default_chunk_tokens(self.config)

    def _read(self, length: int) -> float:
        """Seconds to read `length` fresh tokens a row."""
        from gemma_jax.inference.prefill import prefill
        from gemma_jax.model.state import init_state

        batch, chunk, rng = self.options.batch_size, self._chunk, np.random.default_rng(0)
        self.reading = None  # frees the State before
        state, waiting = init_state(self.config, batch), []
        start = time.perf_counter()
        for at in range(0, length, chunk):
            tokens = rng.integers(0, self.config.vocab_size, (batch, chunk), dtype=np.int32)
            lengths = np.full(batch, min(chunk, length - at), np.int32)
            logits, state = prefill(
                self.params, tokens, state, config=self.config, lengths=lengths, chunk_tokens=chunk
            )
            waiting.append(logits)
            if len(waiting) > 2:
                waiting.pop(0).block_until_ready()
        assert np.isfinite(np.asarray(logits)).all()
        elapsed = time.perf_counter() - start
        assert np.all(np.asarray(state.length) == length)
        self.reading = logits, state
        return elapsed


def peak_bytes() -> int | None:
    """Most memory in use on the device so far; None where the platform does not tell."""
    import jax

    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def label(number: int) -> str:
    """10,000,000 is `10m`, 8,192 is `8k`, 100,000 is `100k`."""
    for unit, scale in (("m", 1_000_000), ("k", 1024), ("k", 1000)):
        if number % scale == 0:
            return f"{number // scale}{unit}"
    return str(number)


def dense_flops(config: GemmaConfig) -> float:
    """Floating-point operations of the matrix products of one token, without LM head and attention."""
    attention = 2 * config.width * (config.num_heads + config.num_kv_heads) * config.head_dim
    return 2.0 * config.num_layers * (attention + 3 * config.width * config.mlp_dim)


def load(options: argparse.Namespace) -> tuple[GemmaConfig, Any]:
    """A converted model, or random weights made on the device, with live memory gates."""
    import jax

    keep_compiled_programs()
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
    parser.add_argument("what", nargs="+", choices=("prefill", "decode"))
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
