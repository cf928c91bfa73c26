"""Reading and writing with one model: tokens a second, memory, time to compile."""

import argparse
import dataclasses
import functools
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from gemma_jax.benchmark import power, profile
from gemma_jax.benchmark.device import peak_bytes, seconds
from gemma_jax.benchmark.hlo import weight_moves
from gemma_jax.benchmark.records import OTHER_DEPTH, PLAIN_DEPTH, Figure, figure_name, label
from gemma_jax.cache import keep_compiled_programs
from gemma_jax.config import PRESETS, GemmaConfig

FEW_TOKENS = 100_000  # the peak of memory after so many is compared with that at the end
BLOCKS = 8  # of tokens, timed at least
WARM, PROFILED = 64, 8  # pieces that are read before a profile, to warm the device, and for it


@dataclasses.dataclass
class Run:
    """One model that reads and writes; what was read last is what is continued.

    Of `options` it uses `tokens`, `batch_size`, `chunk_tokens`, `new_tokens`, `repeats` and `profile`.
    """

    options: argparse.Namespace
    config: GemmaConfig
    params: Any
    reading: tuple[Any, Any] | None = None  # logits of what comes next, and State
    profiles: list[Callable[[], None]] = dataclasses.field(default_factory=list)  # to be made

    def prefill(self) -> Iterator[Figure]:
        """Reading: all tokens given are read, in pieces of one shape."""
        length, repeats = self.options.tokens, self.options.repeats
        name = self._name("prefill", length)
        first, second = self._read(self._chunk), self._read(self._chunk)
        yield f"{name}_compile_seconds", "s", [max(first - second, 0.0)]
        before = min(FEW_TOKENS, length)
        self._read(before)
        peak_before = peak_bytes()
        total = length * self.options.batch_size
        with power.watched() as samples:
            rates = [total / self._read(length) for _ in range(repeats)]
        yield f"{name}_tokens_per_second", "tokens/s", rates
        yield from samples.figures(name)
        dense = dense_flops(self.config) / 1e12
        yield f"{name}_dense", "TFLOP/s", [rate * dense for rate in rates]
        if peak := peak_bytes():
            yield f"{name}_peak_bytes", "bytes", [peak]
            lengths = f"peak_ratio_{label(length)}_{label(before)}"
            ratio = name.replace(f"prefill_{label(length)}", lengths, 1)
            yield ratio, "1", [peak / peak_before]
        self.profiles.append(lambda: self._profile_reading(name))

    def decode(self) -> Iterator[Figure]:
        """Writing after a text of `tokens` tokens: LM head and sampling included."""
        import jax

        from gemma_jax.inference.decode import decode_block
        from gemma_jax.inference.sampling import Greedy

        batch, new_tokens = self.options.batch_size, self.options.new_tokens
        if self.reading is None:
            self._read(self.options.tokens)
        options = {
            "config": self.config,
            "sampling": Greedy(),
            "key": jax.random.key(0),
            "num_tokens": new_tokens,
        }
        start = time.perf_counter()
        program = decode_block.lower(self.params, *self.reading, **options).compile()
        compiled = time.perf_counter() - start
        del options["config"], options["sampling"], options["num_tokens"]

        def block() -> None:
            _, _, *reading = program(self.params, *self.reading, **options)
            self.reading = jax.block_until_ready(tuple(reading))

        rates = [batch * new_tokens / s for s in seconds(block, max(self.options.repeats, BLOCKS))]
        depth = PLAIN_DEPTH if batch == 1 and not is_int8(self.params) else OTHER_DEPTH
        tokens = self.options.tokens
        name = self._name("decode", None if tokens == depth else tokens)
        yield f"{name}_compile_seconds", "s", [compiled]
        yield f"{name}_tokens_per_second", "tokens/s", rates
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(self.params))
        yield f"{name}_weights_read", "GB/s", [rate / batch * size / 1e9 for rate in rates]
        moves = weight_moves(program.as_text(), self.params, self.reading[1])
        yield f"{name}_weight_copies", "1", [len(moves)]
        if peak := peak_bytes():
            yield f"{name}_peak_bytes", "bytes", [peak]
            if is_int8(self.params) and batch == 1:
                yield "int8_peak_bytes", "bytes", [peak]
        self.profiles.append(
            lambda: profile.save(self.options.profile, name, block, program.as_text)
        )

    def save_profiles(self) -> None:
        """Of what was measured, when all figures are known; the last first, as it left the State."""
        while self.profiles:
            self.profiles.pop()()

    def _profile_reading(self, name: str) -> None:
        self._read(WARM * self._chunk)
        more = functools.partial(self._go_on, PROFILED * self._chunk)
        profile.save(self.options.profile, name, more, self._reading_program)

    def _name(self, what: str, tokens: int | None) -> str:
        return figure_name(
            what,
            self.config,
            tokens=tokens,
            batch_size=self.options.batch_size,
            chunk_tokens=self.options.chunk_tokens,
            quantized=is_int8(self.params),
        )

    @property
    def _chunk(self) -> int:
        """Tokens of a row read at once: for a single row the size of the pieces that `read` takes."""
        from gemma_jax.inference.prefill import piece_sizes

        small, large = piece_sizes(self.config)
        long = self.options.batch_size == 1 and self.options.tokens > small
        return self.options.chunk_tokens or (large if long else small)

    @property
    def _static(self) -> dict[str, Any]:
        """The static arguments of `prefill`."""
        from gemma_jax.model.scan import keeps_grid

        fits = keeps_grid(self.config, self._chunk)
        return {"config": self.config, "chunk_tokens": self._chunk, "fits": fits}

    def _read(self, length: int) -> float:
        """Seconds to read `length` fresh tokens a row from their beginning."""
        from gemma_jax.model.state import init_state

        self.reading = None  # frees the State before
        self.reading = None, init_state(self.config, self.options.batch_size)
        start = time.perf_counter()
        self._go_on(length)
        elapsed = time.perf_counter() - start
        assert np.all(np.asarray(self.reading[1].length) == length)
        return elapsed

    def _go_on(self, length: int) -> None:
        """Reads `length` more tokens a row, and waits for the last logits."""
        from gemma_jax.inference.prefill import prefill

        batch, chunk, rng = self.options.batch_size, self._chunk, np.random.default_rng(0)
        options = self._static
        (_, state), self.reading, waiting = self.reading, None, []
        for at in range(0, length, chunk):
            tokens = rng.integers(0, self.config.vocab_size, (batch, chunk), dtype=np.int32)
            lengths = np.full(batch, min(chunk, length - at), np.int32)
            logits, state = prefill(self.params, tokens, state, lengths=lengths, **options)
            waiting.append(logits)
            if len(waiting) > 2:
                waiting.pop(0).block_until_ready()
        assert np.isfinite(np.asarray(logits)).all()
        self.reading = logits, state

    def _reading_program(self) -> str:
        """The optimised HLO module that reads a piece."""
        from gemma_jax.inference.prefill import prefill

        batch, chunk = self.options.batch_size, self._chunk
        tokens, lengths = np.zeros((batch, chunk), np.int32), np.full(batch, chunk, np.int32)
        options = self._static | {"lengths": lengths}
        program = prefill.lower(self.params, tokens, self.reading[1], **options)
        return program.compile().as_text()


def is_int8(params: Any) -> bool:
    """Whether some of the weights are."""
    import jax

    return any(leaf.dtype == np.int8 for leaf in jax.tree.leaves(params))


def dense_flops(config: GemmaConfig) -> float:
    """Floating-point operations of the matrix products of one token, without LM head and attention."""
    attention = 2 * config.width * (config.num_heads + config.num_kv_heads) * config.head_dim
    return 2.0 * config.num_layers * (attention + 3 * config.width * config.mlp_dim)


def read_config(options: argparse.Namespace) -> GemmaConfig:
    """The shape that is measured, with the memory that is asked for; no weights are touched.

    Raises:
        InputError, CorruptError: `--model` names no checkpoint.
    """
    from gemma_jax.checkpoint import store

    config = store.read_config(options.model) if options.model else PRESETS[options.preset]
    changes = {
        "rule": options.memory,
        "segment_length": options.segment_length,
        "local_attention": options.local_attention,
    }
    if options.quantize:
        config = dataclasses.replace(config, quantization=options.quantize)
    return config.with_memory(**{k: v for k, v in changes.items() if v is not None})


def load(options: argparse.Namespace) -> tuple[GemmaConfig, Any]:
    """A converted model, or random weights made on the device, with live memory gates."""
    if options.profile:
        profile.check()
    keep_compiled_programs()
    config = read_config(options)
    if options.model:
        from gemma_jax.checkpoint import store

        return config, store.load(options.model, memory=options.memory).params
    return config, random_params(config)


def random_params(config: GemmaConfig) -> Any:
    """Parameters made on the device; those of the memory are random as well, so that it is used."""
    import jax

    from gemma_jax.model.transformer import init_params

    params = jax.jit(lambda key: init_params(config, key))(jax.random.key(0))

    def open_gates(path: tuple[Any, ...], leaf: Any) -> Any:
        name = jax.tree_util.keystr(path)
        if "'memory'" not in name:
            return leaf
        key = jax.random.key(zlib.crc32(name.encode()))
        return 0.5 * jax.random.normal(key, leaf.shape, leaf.dtype)

    return jax.tree.map_with_path(open_gates, params)
