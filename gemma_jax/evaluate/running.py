"""Reading haystacks and answering questions about them, in a few compiled shapes.

All of a grid takes the same programs: haystacks are read in pieces [rows, chunk] (shared ones in
[beside, chunk]), questions are padded to one length and asked [rows] at a time, and answers are written in
blocks. Rows are right-padded; each has its own length.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax.config import GemmaConfig
from gemma_jax.evaluate.answers import Answer, to_text
from gemma_jax.evaluate.plan import rows_to_be_busy
from gemma_jax.inference.decode import decode_block
from gemma_jax.inference.pieces import PIECES_AHEAD, PIECES_IN_FLIGHT, ahead, pieces_of
from gemma_jax.inference.prefill import default_chunk_tokens, prefill
from gemma_jax.inference.reader import peak_memory_bytes, stop_token_ids
from gemma_jax.inference.sampling import Greedy
from gemma_jax.inference.writing import default_block_tokens, padded_stop_ids
from gemma_jax.model.state import State, init_state

MOST_CHUNKS = 8  # of a single row, that a batch of a small model reads at once

OnTokens = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class Reader:
    """One model that reads and answers `rows` texts at a time.

    Attributes:
        question_tokens: all questions are padded to so many.
        beside: shared haystacks that are read at a time.
    """

    model: Any
    rows: int
    question_tokens: int
    beside: int = 1

    def read(
        self, texts: Sequence[Iterable[Sequence[int]]], rows: int, on_tokens: OnTokens
    ) -> State:
        """Reads up to `rows` streams of ids side by side; rows beyond them stay empty.

        `on_tokens` is told how many tokens the device has finished with, piece by piece.
        """
        config: GemmaConfig = self.model.config
        chunk = chunk_tokens(config, rows)
        state, in_flight = init_state(config, rows), []

        def wait_for_oldest() -> None:
            count, logits = in_flight.pop(0)
            logits.block_until_ready()
            on_tokens(count)

        pieces = side_by_side(texts, rows, chunk, config.vocab_size)
        for piece, lengths in ahead(pieces, PIECES_AHEAD):
            logits, state = prefill(
                self.model.params,
                piece,
                state,
                config=config,
                lengths=lengths,
                chunk_tokens=chunk,
            )
            in_flight.append((int(lengths.sum()), logits))
            if len(in_flight) > PIECES_IN_FLIGHT:
                wait_for_oldest()
        while in_flight:
            wait_for_oldest()
        return state

    def answer(
        self, state: State, questions: Sequence[Sequence[int]], limits: Sequence[int]
    ) -> list[Answer]:
        """Answers questions greedily, one per row of the State, which is consumed.

        Args:
            questions: at most `rows`; what rows beyond them are asked does not matter.
            limits: of each answer, in tokens.
        """
        config, params = self.model.config, self.model.params
        stops = stop_token_ids(self.model)
        padded = jax.device_put(padded_stop_ids(stops))
        asked = [*questions, *[questions[-1]] * (self.rows - len(questions))]
        tokens = np.zeros((self.rows, self.question_tokens), np.int32)
        for row, ids in zip(tokens, asked, strict=True):
            row[: len(ids)] = ids
        lengths = np.array([len(ids) for ids in asked], np.int32)
        logits, state = prefill(
            params,
            tokens,
            state,
            config=config,
            lengths=lengths,
            chunk_tokens=chunk_tokens(config, self.rows),
        )
        finite = np.array(finite_rows(logits))
        written: list[list[int]] = [[] for _ in questions]
        going = set(range(len(questions)))
        while going:
            block, counts, logits, state = decode_block(
                params,
                logits,
                state,
                config=config,
                sampling=Greedy(),
                key=jax.random.key(0),
                num_tokens=default_block_tokens(),
                stop_ids=padded,
            )
            block, counts, still = jax.device_get((block, counts, finite_rows(logits)))
            for row in list(going):
                ids = written[row]
                ids += block[row, : counts[row]].tolist()
                finite[row] &= still[row]
                if ids[-1] in stops or len(ids) >= limits[row]:
                    del ids[limits[row] :]
                    going.discard(row)
        return [
            Answer(to_text(self.model.tokenizer, ids, stops), len(ids), bool(fine))
            for ids, fine in zip(written, finite, strict=False)
        ]

    @property
    def device(self) -> str:
        """What it runs on."""
        return jax.local_devices()[0].device_kind

    def peak_bytes(self) -> int | None:
        """Most device memory in use so far."""
        return peak_memory_bytes()

    def warm_up(self, shared: Iterable[bool]) -> float:
        """Compiles what will be needed; returns the seconds that took."""
        start = time.perf_counter()
        bos = self.model.config.bos_id
        for is_shared in set(shared):
            rows = self.beside if is_shared else self.rows
            state = self.read([[[bos, bos]]], rows, lambda count: None)
            state = self.fork(state) if is_shared else state
            self.answer(state, [[bos]], [1])
        return time.perf_counter() - start

    def fork(self, state: State, read_in: Sequence[int] = ()) -> State:
        """A State for each question's row: that of the shared haystack which was read in the row that
        `read_in` names (the first by default). The given State stays as it is."""
        sources = np.zeros(self.rows, np.int32)
        sources[: len(read_in)] = read_in
        return fork(state, sources)


def chunk_tokens(config: GemmaConfig, rows: int) -> int:
    """Tokens of each row read at once: a batch takes about the memory of a single row, or, so that small
    models keep a GPU busy, that of up to MOST_CHUNKS rows."""
    alone, length = default_chunk_tokens(config), config.memory.segment_length
    if alone < length:
        return alone
    few = 1 if jax.default_backend() == "cpu" else rows_to_be_busy(config, MOST_CHUNKS)
    return min(max(few * alone // rows // length, 1) * length, alone)


def side_by_side(
    texts: Sequence[Iterable[Sequence[int]]], rows: int, size: int, vocab_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pieces [rows, size] int32 of several streams, and how many ids of each row they hold [rows]."""
    streams = [pieces_of(text, size, vocab_size) for text in texts]
    while True:
        pieces, lengths = np.zeros((rows, size), np.int32), np.zeros(rows, np.int32)
        for row, stream in enumerate(streams):
            piece, count = next(stream, (None, 0))
            if count:
                pieces[row], lengths[row] = piece[0], count
        if not lengths.any():
            return
        yield pieces, lengths


@jax.jit
def fork(state: State, sources: jax.Array) -> State:
    """The rows of a State that `sources` [B] names; it stays as it is."""
    return jax.tree.map(lambda leaf: leaf[sources], state)


@jax.jit
def finite_rows(logits: jax.Array) -> jax.Array:
    """[B] bool: all logits of the row are finite."""
    return jnp.isfinite(logits).all(axis=-1)


def without_memory(model: Any) -> Any:
    """The same model with memory off; it shares the weights."""
    return dataclasses.replace(model, config=model.config.with_memory(rule="off"))
