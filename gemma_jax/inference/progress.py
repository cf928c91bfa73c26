"""How fast and how far: measurements that readers and command lines share."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far the model has read."""

    tokens: int  # read, and finished by the device
    total_tokens: int | None  # an estimate until everything is tokenised; None: not known
    tokens_per_second: float | None  # None: not known, as all of the time may be compilation
    seconds_left: float | None


class Rate:
    """Tokens per second, without the first step where there are more: it includes compilation."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._first: tuple[int, float] | None = None
        self._last = (0, self._start)

    def update(self, tokens: int) -> None:
        """Notes that `tokens` are done in all."""
        self._last = (tokens, time.perf_counter())
        self._first = self._first or self._last

    @property
    def per_second(self) -> float | None:
        """None before anything was done."""
        if self._first is None:
            return None
        seconds = self._last[1] - self._start
        return self.steady or (self._last[0] / seconds if seconds > 0 else None)

    @property
    def steady(self) -> float | None:
        """The same without the first step; None before there is a second."""
        if self._first is None:
            return None
        tokens, seconds = self._last[0] - self._first[0], self._last[1] - self._first[1]
        return tokens / seconds if tokens > 0 and seconds > 0 else None


class Tokenized:
    """Counts what the tokenizer gives, to estimate the whole while it is at work."""

    def __init__(self, share_read: Callable[[], float | None]):
        """`share_read` tells which share of the text (0 to 1) is tokenised, if that is known."""
        self._share_read = share_read
        self._tokens = 0
        self._share: float | None = None

    def count(self, ids: Iterable[Sequence[int]]) -> Iterator[Sequence[int]]:
        """Passes lists of ids on."""
        for some in ids:
            self._tokens += len(some)
            self._share = self._share_read()
            yield some
        self._share = 1.0

    def progress(self, done: int, rate: Rate) -> Progress:
        """Where a model stands that has read `done` tokens."""
        per_second = rate.steady
        if not self._share:
            return Progress(done, None, per_second, None)
        total = max(done, round(self._tokens / self._share))
        left = (total - done) / per_second if per_second else None
        return Progress(done, total, per_second, left)


class Meter:
    """Measures one reading, from the tokenizer to what the device has finished.

    Attributes:
        rate: of the reading.
        tokens: how many the device has read.
    """

    def __init__(
        self,
        share_read: Callable[[], float | None] = lambda: None,
        on_progress: Callable[[Progress], None] | None = None,
    ):
        self.rate = Rate()
        self._tokenized = Tokenized(share_read)
        self._on_progress = on_progress
        self.tokens = 0

    def count(self, ids: Iterable[Sequence[int]]) -> Iterator[Sequence[int]]:
        """Passes lists of ids on."""
        return self._tokenized.count(ids)

    def finished(self, tokens: int) -> None:
        """Notes that the device has read some more tokens."""
        self.tokens += tokens
        self.rate.update(self.tokens)
        if self._on_progress:
            self._on_progress(self._tokenized.progress(self.tokens, self.rate))
