"""Batches: what is read in step i, a pure function of the seed, i and how far the training is.

Sequences have a few lengths, one compiled program each; short ones come in larger batches, so that a
step always reads about the same number of tokens. Batches are made ahead by other processes.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from gemma_jax.errors import UsageError
from gemma_jax.train.plan import Ramp

AHEAD = 4  # batches that wait, beyond one for each process that makes them
FRESH = -1  # start of a sequence whose memory begins empty
CURRICULUM, ROWS, JITTER = 0, 1, 2  # streams of random numbers of a step


@dataclasses.dataclass(frozen=True)
class Mixture:
    """What a batch is made of. It can be given to other processes.

    Attributes:
        sources: what makes its rows; one that needs longer sequences waits for them.
        weights: how often each source does, by the length of the sequences.
        seed: of everything random.
        segment_length: S.
        segments: the fewest and the most segments of a sequence.
        tokens_per_step: read in a step, about; at least those of the longest sequence of each part.
        parts: into which a batch's rows are divided, see `make_train_step`'s `accumulate`.
        growth: share of the training after which the longest sequences have come; 0: from the start.
        short_share: of the batches, to the end, that are of any length up to the longest of the time.
        carry: share of the sequences that begin with what another one left in memory.
        carried_rows: how many memories are kept for that.
    """

    sources: tuple[Any, ...]
    weights: tuple[Ramp, ...]
    seed: int
    segment_length: int
    segments: tuple[int, int]
    tokens_per_step: int
    parts: int = 1
    growth: float = 0.6
    short_share: float = 0.3
    carry: float = 0.0
    carried_rows: int = 0

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of sequences, in tokens: doubling from the shortest to the longest."""
        low, high = self.segments
        counts = [low]
        while counts[-1] * 2 < high:
            counts.append(counts[-1] * 2)
        return tuple(n * self.segment_length for n in dict.fromkeys([*counts, high]))

    @property
    def files(self) -> list[str]:
        """Names of the files that rows are made of: equal names are equal content."""
        return sorted({name for source in self.sources for name in source.files})

    def rows(self, length: int) -> int:
        """Sequences of a batch."""
        return self.tokens_per_step // (length * self.parts) * self.parts

    def shares(self, length: int) -> np.ndarray:
        """Of each source in sequences of this length; those that need longer ones have none."""
        weights = [
            weight.at(length) if source.shortest <= length else 0.0
            for source, weight in zip(self.sources, self.weights, strict=True)
        ]
        return np.array(weights) / np.sum(weights)

    def check(self) -> None:
        """Raises `UsageError` when a batch cannot be made."""
        lengths = self.lengths
        if not self.rows(lengths[-1]):
            raise UsageError(
                f"--tokens-per-step is {self.tokens_per_step}, but {self.parts} part(s) with a sequence"
                f" of {lengths[-1]} tokens need {self.parts * lengths[-1]}: raise it, or lower --segments."
            )
        needed = [source.shortest for source in self.sources]
        for length, too_long in ((lengths[0], min(needed)), (lengths[-1], max(needed))):
            if too_long > length:
                raise UsageError(
                    f"Some sequences have {length} tokens, and the data need {too_long}: choose"
                    f" --segments from {-(-too_long // self.segment_length)} on."
                )


@dataclasses.dataclass
class HostBatch:
    """A batch as it is made: rows of `Row`, and where their memories begin.

    Attributes:
        ids: [B, T + 1] int32; the last is only predicted.
        weights: [B, T] float32, of the predictions.
        answers: [B, T] bool.
        wanted: [B, T] int8, of the tokens that are read: see `Row`.
        start: [B] int32, which of the kept memories a sequence begins with, or FRESH.
        jitter: 0 to 1, how much of the write gates' margin this step has.
    """

    ids: np.ndarray
    weights: np.ndarray
    answers: np.ndarray
    wanted: np.ndarray
    start: np.ndarray
    jitter: float

    @property
    def tokens(self) -> int:
        return self.weights.size


def make_batch(mixture: Mixture, step: int, progress: float) -> HostBatch:
    """The batch of a step, made when this share of the training (0 to 1) was done."""
    length = choose_length(mixture, step, progress)
    rng = np.random.default_rng([mixture.seed, step, ROWS])
    shares = mixture.shares(length)
    count = mixture.rows(length)
    start = np.full(count, FRESH, np.int32)
    if mixture.carried_rows:
        carries = rng.uniform(size=count) < mixture.carry
        start = np.where(carries, rng.integers(mixture.carried_rows, size=count), start)
    rows = [
        mixture.sources[rng.choice(len(shares), p=shares)].row(own, length + 1)
        for own in rng.spawn(count)
    ]
    return HostBatch(
        np.stack([row.ids for row in rows]),
        np.stack([row.weights[1:] for row in rows]),
        np.stack([row.answers[1:] for row in rows]),
        np.stack([row.wanted[:-1] for row in rows]),
        start.astype(np.int32),
        np.random.default_rng([mixture.seed, step, JITTER]).uniform(),
    )


def choose_length(mixture: Mixture, step: int, progress: float) -> int:
    """Of the sequences of a step, in tokens: growing by constant factors, with shorter ones between."""
    lengths = mixture.lengths
    grown = 1.0 if mixture.growth <= 0 else min(1.0, progress / mixture.growth)
    longest = lengths[0] * (lengths[-1] / lengths[0]) ** grown
    there = [length for length in lengths if length <= longest * (1 + 1e-9)]
    rng = np.random.default_rng([mixture.seed, step, CURRICULUM])
    return int(rng.choice(there)) if rng.uniform() < mixture.short_share else there[-1]


class Feeder:
    """Batches in the order of their steps, made ahead by `workers` processes (0: by a thread).

    Which batches come does not depend on `workers`. Use it as a context.

    Args:
        first: the first step.
        progress: tells which share of the training is done at a step, as far as can be known when its
            batch is begun.
    """

    def __init__(
        self, mixture: Mixture, first: int, progress: Callable[[int], float], workers: int = 0
    ):
        self._progress, self._next = progress, first
        self._ahead = workers + AHEAD
        self._pending: collections.deque[concurrent.futures.Future] = collections.deque()
        if workers:
            self._pool: Any = concurrent.futures.ProcessPoolExecutor(
                workers, multiprocessing.get_context("spawn"), _begin_worker, (mixture,)
            )
            self._make: Callable[..., HostBatch] = _make_in_worker
        else:
            self._pool = concurrent.futures.ThreadPoolExecutor(1, "gemma_jax batches")
            self._make = functools.partial(make_batch, mixture)

    def __enter__(self) -> Iterator[HostBatch]:
        return self._batches()

    def __exit__(self, *_: Any) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _batches(self) -> Iterator[HostBatch]:
        while True:
            while len(self._pending) <= self._ahead:
                step, self._next = self._next, self._next + 1
                self._pending.append(self._pool.submit(self._make, step, self._progress(step)))
            yield self._pending.popleft().result()


_mixture: Mixture | None = None  # of a worker


def _begin_worker(mixture: Mixture) -> None:
    """Prepares a process that makes batches: it ends with the one that started it."""
    global _mixture
    _mixture = mixture
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there are as many processes as are wanted
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _make_in_worker(step: int, progress: float) -> HostBatch:
    return make_batch(_mixture, step, progress)
