"""A haystack as it is read, and what is known of the trials in it."""

import dataclasses
import hashlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from gemma_jax.config import GLOBAL, GemmaConfig
from gemma_jax.tasks.base import Composition, EncodeBatch, Episode, Question, Task

EXTRA_TOKENS = 8  # an answer may have beyond its reference


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question in ids, and how many an answer to it may have."""

    question: Question
    ids: tuple[int, ...]
    limit: int


@dataclasses.dataclass(frozen=True)
class Haystack:
    """A text to be read once, with its questions.

    Attributes:
        name: differs from that of every other haystack of the grid.
        tokens: BOS, text and the longest question have at most so many.
    """

    name: str
    task: Task
    tokens: int
    episode: Episode
    asked: tuple[Asked, ...]

    @property
    def room(self) -> int:
        """Tokens of the text itself."""
        return self.tokens - 1 - max(len(asked.ids) for asked in self.asked)


def ask(episode: Episode, encode_batch: EncodeBatch) -> tuple[Asked, ...]:
    """An episode's questions in ids."""
    questions = episode.questions
    ids = encode_batch([question.text for question in questions])
    references = encode_batch([" " + ", ".join(question.answers) for question in questions])
    return tuple(
        Asked(question, tuple(some), len(reference) + EXTRA_TOKENS)
        for question, some, reference in zip(questions, ids, references, strict=True)
    )


class Text:
    """The ids of a haystack, BOS first, as they are made; can be iterated once.

    Attributes:
        tokens: given so far.
        seconds: spent on making them.
    """

    def __init__(
        self, haystack: Haystack, books: Sequence[str], encode_batch: EncodeBatch, bos_id: int
    ):
        """Raises `UsageError` when the facts do not fit."""
        filler = haystack.task.filler(haystack.episode, books)
        self._composition = Composition(haystack.episode, filler, haystack.room, encode_batch)
        self._bos_id = bos_id
        self._hash = hashlib.sha256()
        self.tokens, self.seconds = 0, 0.0

    def __iter__(self) -> Iterator[Sequence[int]]:
        pieces = self._pieces()
        while True:
            start = time.perf_counter()
            ids = next(pieces, None)
            if ids is not None:
                self._hash.update(as_bytes(ids))
            self.seconds += time.perf_counter() - start
            if ids is None:
                return
            self.tokens += len(ids)
            yield ids

    def _pieces(self) -> Iterator[Sequence[int]]:
        yield [self._bos_id]
        yield from self._composition

    def trial(self, asked: Asked) -> dict[str, Any]:
        """Once it was read: what is known of a question about it."""
        composition = self._composition
        read = self.tokens + len(asked.ids)
        latest = max(composition.ends[fact] for fact in asked.question.facts)
        text = self._hash.copy()
        text.update(as_bytes(asked.ids))
        return {
            "tokens_read": read,
            "distance": read - 1 - latest,  # `ends` do not count BOS
            "repeated_share": composition.repeated_tokens / max(composition.tokens, 1),
            "text_sha256": text.hexdigest(),
        }


def as_bytes(ids: Sequence[int]) -> bytes:
    """The same on every machine."""
    return np.asarray(ids, "<i4").tobytes()


def reach(config: GemmaConfig) -> int:
    """Tokens before the last that anything can come from by local attention alone.

    Each layer lets a token see some that lie before it, and these have seen, in the layer below, what
    lies before them. The bound is that of the token that stands best in its segment; a fact that ends
    so many tokens before the end of what is read, or more, is known from memory alone.
    """
    length = config.memory.segment_length
    back = 2 if config.memory.local_attention == "transformer_xl" else 1
    last = np.arange(length) + length * 2 * (config.num_layers + 2)
    last += config.num_layers * (config.sliding_window or 0)
    first = last.copy()
    for kind in reversed(config.layer_types):
        if kind == GLOBAL:
            first = (first // length + 1 - back) * length
        else:
            first = first - (config.sliding_window - 1)
    return int((last + 1 - first).max())
