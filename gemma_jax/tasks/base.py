"""What every task is made of: facts hidden in a haystack, and questions about them.

A task plans an `Episode` from a seed: facts with their depths, and questions about them. `Composition`
hides the facts in a stream of filler and gives the ids a model reads, piece by piece; the haystack is
never held whole. One episode may have many questions: it is read once, and each question starts from
the State that is left.

Pieces of text begin with the white space that separates them from what stands before, because
tokenizers like Gemma's join a space to the word after it.
"""

import dataclasses
import itertools
import math
import random
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from gemma_jax.errors import InputError, UsageError

EncodeBatch = Callable[[Sequence[str]], list[list[int]]]
Encoded = tuple[np.ndarray, np.ndarray]  # ids [T] int32; where pieces end in them [pieces + 1]

FIRST_PIECES, BATCH_PIECES = 32, 1024  # pieces of filler tokenised at once: few at first, then more


@dataclasses.dataclass(frozen=True)
class Piece:
    """A sentence or so of filler."""

    text: str  # begins with its separator
    fresh: bool = True  # not shown before in this episode


class Sheet:
    """Pieces of filler that many episodes show; the ids that one tokenizer gave them are kept."""

    def __init__(self) -> None:
        self._encoder: weakref.ref[EncodeBatch] | None = None
        self._encoded: Encoded | None = None

    def texts(self) -> Sequence[str]:
        """What the pieces say, each with its separator."""
        raise NotImplementedError

    def encoded(self, encode_batch: EncodeBatch) -> Encoded:
        """All of the pieces in ids."""
        if self._encoder is None or self._encoder() is not encode_batch:
            self._encoded = joined(encode_batch(self.texts()))
            self._encoder = weakref.ref(encode_batch)
        return self._encoded


@dataclasses.dataclass(frozen=True)
class Run:
    """Pieces of a sheet that are shown one after the other, from number `first` to before `last`."""

    sheet: Sheet
    first: int
    last: int
    fresh: bool = True  # as of a piece

    def encoded(self, encode_batch: EncodeBatch) -> Encoded:
        """The pieces in ids."""
        ids, ends = self.sheet.encoded(encode_batch)
        ends = ends[self.first : self.last + 1]
        return ids[ends[0] : ends[-1]], ends - ends[0]


@dataclasses.dataclass(frozen=True)
class Fact:
    """Something to be remembered: one sentence, or a few that belong together."""

    text: str  # begins with its separator
    depth: float  # share of the filler that stands before it, 0 to 1


@dataclasses.dataclass(frozen=True)
class Question:
    """Asked after the haystack; the model's continuation is the answer."""

    text: str  # begins with its separator, ends where the answer begins, without a space
    answers: tuple[str, ...]  # the references, all of them wanted
    facts: tuple[int, ...]  # which of the episode's facts it takes to answer
    depth: float  # where a grid shows it: the depth that was asked for

    @property
    def reply(self) -> str:
        """The right answer as a model is to write it, with the space that it begins with."""
        return f" {', '.join(self.answers)}."


@dataclasses.dataclass(frozen=True)
class Episode:
    """A text to be read once, and what is asked about it."""

    task: str
    seed: int
    opening: str  # stands before everything; may be empty
    facts: tuple[Fact, ...]  # in the order in which they stand in the text
    questions: tuple[Question, ...]


class Task:
    """A family of episodes.

    Attributes:
        name: as the command line knows it.
        chance: accuracy of a reader that saw the question and knows the rules, but not the facts.
        most_questions: how many one text may have; None: as many as there are different keys.
        haystack: what facts are hidden in: `grass`, `books`, `needles` or `words`.
        vocabulary: the words that answers are made of, where these are a closed set; a tokenizer that
            is learnt for the task has them as tokens. Without digits.
    """

    name: str
    haystack: str
    chance: float = 0.0
    most_questions: int | None = None
    vocabulary: tuple[str, ...] = ()

    def episode(self, seed: int, depths: Sequence[float], questions_per_depth: int = 1) -> Episode:
        """Plans a text with `questions_per_depth` questions about facts at each of `depths`.

        Equal arguments give equal episodes on every machine.

        Raises:
            UsageError: the task cannot ask so many different questions about one text.
        """
        raise NotImplementedError

    def asking_more(self, most: int) -> "Task":
        """The task with up to `most` further questions about what each of its questions is about.

        To learn from; one that knows no others is as it was.
        """
        return self

    def filler(self, episode: Episode, books: Iterable[str]) -> Iterator[Piece | Run]:
        """What stands around the facts, without end; `books` are paths of texts to take it from."""
        raise NotImplementedError

    def score(self, question: Question, answer: str) -> float:
        """0 to 1: the share of the references that the answer's first candidates give."""
        raise NotImplementedError


class Draft:
    """An episode that is being written; facts may come in any order."""

    def __init__(self, task: str, seed: int, opening: str = ""):
        self._task, self._seed, self._opening = task, seed, opening
        self._facts: list[Fact] = []
        self._questions: list[Question] = []

    def fact(self, text: str, depth: float) -> int:
        """Adds a fact and gives its number; of those at one depth the earlier added stands first."""
        self._facts.append(Fact(text, depth))
        return len(self._facts) - 1

    def ask(self, text: str, answers: Iterable[str], facts: Iterable[int], depth: float) -> None:
        """Adds a question; `facts` are numbers that `fact` gave."""
        self._questions.append(Question(text, tuple(answers), tuple(facts), depth))

    def episode(self) -> Episode:
        """What was written, with the facts in the order of their depths."""
        order = sorted(range(len(self._facts)), key=lambda number: self._facts[number].depth)
        place = {number: index for index, number in enumerate(order)}
        return Episode(
            self._task,
            self._seed,
            self._opening,
            tuple(self._facts[number] for number in order),
            tuple(
                dataclasses.replace(question, facts=tuple(place[n] for n in question.facts))
                for question in self._questions
            ),
        )


def spread(depths: Sequence[float], count: int, rng: random.Random) -> list[tuple[float, float]]:
    """`count` depths about each of `depths`, as pairs (the depth asked for, the depth to use).

    One is exactly where it was asked for. Several are spread over a band about it, at most 0.05 wide
    and half as wide as the smallest gap to a neighbour, so that they do not stand in one heap.

    Raises:
        UsageError: a depth is not between 0 and 1, or there is nothing to ask.
    """
    if not depths or count < 1:
        raise UsageError("There is nothing to ask: give at least one depth and one question.")
    if any(not 0 <= depth <= 1 for depth in depths):
        raise UsageError(f"Depths are {list(depths)}: they must be between 0 and 1.")
    different = sorted(set(depths))
    gaps = (after - before for before, after in itertools.pairwise(different))
    width = min(0.05, 0.5 * min(gaps, default=1.0))
    pairs = []
    for depth in depths:
        low = min(max(depth - width / 2, 0.0), 1.0 - width)
        for index in range(count):
            within = low + width * (index + rng.random()) / count
            pairs.append((depth, depth if count == 1 else within))
    return pairs


class Composition:
    """The ids of an episode's text, without BOS and questions; can be iterated once.

    A fact stands before the first piece of filler that has the fact's depth or more behind it. The text
    has at most `tokens` tokens, and misses fewer than its next piece of filler would have had.

    Attributes:
        tokens: given so far.
        repeated_tokens: those of filler that had been shown before.
        ends: where each fact ends, in tokens from the start of the text.
    """

    def __init__(
        self,
        episode: Episode,
        filler: Iterator[Piece | Run],
        tokens: int,
        encode_batch: EncodeBatch,
    ):
        """What is given the same `encode_batch`, the same object, shares the ids of books.

        Raises:
            UsageError: the facts alone are longer than `tokens`.
        """
        self._opening, *self._facts = (
            np.asarray(ids, np.int32)
            for ids in encode_batch([episode.opening, *(fact.text for fact in episode.facts)])
        )
        self._episode, self._filler, self._encode = episode, filler, encode_batch
        self._room = tokens - len(self._opening) - sum(map(len, self._facts))
        if self._room < 0:
            raise UsageError(
                f"{tokens} tokens are too few for {episode.task}: its facts alone take"
                f" {tokens - self._room}, so choose a greater length or ask fewer questions."
            )
        self.tokens = self.repeated_tokens = 0
        self.ends: list[int] = []

    def __iter__(self) -> Iterator[np.ndarray]:
        self.tokens = len(self._opening)
        yield self._opening
        filled = 0
        for fresh, (ids, ends) in self._encoded():
            fits = int(np.searchsorted(ends, self._room - filled, side="right"))
            ends = ends[:fits]
            yield from self._with_facts(ids, ends, filled)
            taken = int(ends[-1])
            filled += taken
            self.repeated_tokens += 0 if fresh else taken
            if taken < len(ids):
                break
        else:
            raise InputError("The haystack's filler ended: it must be without end.")
        yield from self._facts_before(math.inf)

    def _with_facts(self, ids: np.ndarray, ends: np.ndarray, filled: int) -> Iterator[np.ndarray]:
        """Pieces of filler, `filled` tokens of which were before, and the facts that stand between."""
        given = 0
        facts = self._episode.facts
        while len(ends) > 1 and len(self.ends) < len(facts):
            depth = facts[len(self.ends)].depth
            if depth > (filled + int(ends[-2])) / self._room:
                break
            shares = (filled + ends[:-1]) / self._room  # that stand before each piece
            place = int(ends[np.searchsorted(shares, depth)])
            if place > given:
                yield self._count(ids[given:place])
                given = place
            yield from self._facts_before((filled + place) / self._room)
        if ends[-1] > given:
            yield self._count(ids[given : ends[-1]])

    def _facts_before(self, depth: float) -> Iterator[np.ndarray]:
        facts = self._episode.facts
        while len(self.ends) < len(facts) and facts[len(self.ends)].depth <= depth:
            ids = self._count(self._facts[len(self.ends)])
            self.ends.append(self.tokens)
            yield ids

    def _count(self, ids: np.ndarray) -> np.ndarray:
        self.tokens += len(ids)
        return ids

    def _encoded(self) -> Iterator[tuple[bool, Encoded]]:
        """Pieces of filler that are all fresh, or all not."""
        for kind, some in itertools.groupby(self._filler, type):
            if kind is Run:
                yield from ((run.fresh, run.encoded(self._encode)) for run in some)
            else:
                yield from self._encoded_pieces(some)

    def _encoded_pieces(self, filler: Iterator[Piece]) -> Iterator[tuple[bool, Encoded]]:
        size = FIRST_PIECES  # a short text needs few
        while pieces := list(itertools.islice(filler, size)):
            size = min(2 * size, BATCH_PIECES)
            texts = list(dict.fromkeys(piece.text for piece in pieces))  # filler may repeat itself
            ids = dict(zip(texts, self._encode(texts), strict=True))
            for fresh, some in itertools.groupby(pieces, lambda piece: piece.fresh):
                yield fresh, joined([ids[piece.text] for piece in some])


def joined(pieces: Sequence[Sequence[int]]) -> Encoded:
    """Ids of pieces one after the other, and where each ends."""
    ends = np.zeros(len(pieces) + 1, np.int64)
    np.cumsum([len(ids) for ids in pieces], out=ends[1:])
    ids = np.fromiter(itertools.chain.from_iterable(pieces), np.int32, int(ends[-1]))
    return ids, ends
