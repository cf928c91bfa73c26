"""What sequences are made of: texts, prompts with answers, and tasks hidden in texts.

A source makes a `Row` of any length from a random generator: equal generators make equal rows. It
holds paths and settings only, so other processes can be given it; what it reads is mapped into memory
when it is first used. `shortest` is the least length that makes sense, `files` names what it reads, and
`says_what_to_keep` tells whether any of its tokens are facts that memory should keep.
"""

import dataclasses
import functools
import itertools
import random
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from gemma_jax import tasks
from gemma_jax.errors import UsageError
from gemma_jax.tasks.base import Episode, Task
from gemma_jax.text import BatchEncoder
from gemma_jax.train.corpus import RecordBook, Records, Text, haystack
from gemma_jax.train.noise import Noise
from gemma_jax.train.plan import Ramp
from gemma_jax.train.wording import loosely

MOST_QUESTIONS = 64  # of an episode
STOP = "."  # ends every reply
SHARE_OF_ITEMS = 0.7  # of a sequence that is not packed, at most; the rest is haystack
NEAR = 0.25  # share of the questions asked within local attention's reach of their fact
AT_THE_END = 0.35  # share asked when everything was read, as tests do
ALONE = 0.3  # share of the sequences with one question, among much that is not to be remembered
LEAST_ANSWER = 3.0  # tokens that an answer counts as, at least
KEEP, LEAVE, UNSAID = 1, 0, -1  # what memory should do with a token
# Tasks whose facts are like no sentence: any token could be one.
SAYS_NOTHING = ("copy", "mqar", "common_words", "frequent_words")
SEEDS = 2**31  # of episodes
TRIES = 16  # to find an episode that is not too long


@dataclasses.dataclass
class Row:
    """A sequence, BOS included.

    Attributes:
        ids: [T] int32.
        weights: [T] float32, how much it counts that each is predicted.
        answers: [T] bool, whether it belongs to an answer.
        wanted: [T] int8, whether memory should keep it: KEEP, LEAVE, or UNSAID.
    """

    ids: np.ndarray
    weights: np.ndarray
    answers: np.ndarray
    wanted: np.ndarray


@dataclasses.dataclass(frozen=True)
class Part:
    """A piece of a sequence: its ids, whether it is an answer, and whether memory should keep it."""

    ids: Any
    answer: bool = False
    wanted: int = LEAVE


def _files(texts: tuple[Text, ...], noise: Noise | None) -> list[str]:
    return [text.ids.name for text in (*texts, *(noise.others if noise else ()))]


def _is_strange(noise: Noise | None, rng: np.random.Generator) -> bool:
    return noise is not None and rng.uniform() < noise.share


@dataclasses.dataclass(frozen=True)
class TextSource:
    """Stretches of texts, each after a BOS; some of them noise, which nobody has to predict.

    Attributes:
        language_weight: how much each token counts, by the length of the sequences.
    """

    texts: tuple[Text, ...]
    bos_id: int
    language_weight: Ramp
    noise: Noise | None = None
    says_what_to_keep: ClassVar[bool] = False

    @property
    def files(self) -> list[str]:
        return _files(self.texts, self.noise)

    @property
    def shortest(self) -> int:
        """Tokens of the shortest sequence that can be made."""
        return 2

    def row(self, rng: np.random.Generator, length: int) -> Row:
        ids, _ = haystack(self.texts).cut(rng, length - 1)
        strange = _is_strange(self.noise, rng)
        if strange:
            ids = self.noise.make(rng, ids)
        weights = np.full(
            length, 0.0 if strange else self.language_weight.at(length - 1), np.float32
        )
        answers, wanted = np.zeros(length, bool), np.full(length, LEAVE, np.int8)
        return Row(_joined([[self.bos_id], ids]), weights, answers, wanted)


@dataclasses.dataclass(frozen=True)
class RecordSource:
    """Prompts with their answers, as many whole ones as fit, then padding; the answers count."""

    records: Records
    says_what_to_keep: ClassVar[bool] = False

    @property
    def files(self) -> list[str]:
        return [self.records.ids.name]

    @property
    def shortest(self) -> int:
        return _record_book(self.records).shortest

    def row(self, rng: np.random.Generator, length: int) -> Row:
        book = _record_book(self.records)
        ids, weights, answers = (np.zeros(length, kind) for kind in (np.int32, np.float32, bool))
        row = Row(ids, weights, answers, np.full(length, UNSAID, np.int8))
        at = 0
        while (drawn := book.draw(rng, length - at)) is not None:
            ids, answer = drawn
            row.ids[at : at + len(ids)] = ids
            row.answers[at + answer : at + len(ids)] = True
            at += len(ids)
        row.weights[row.answers] = 1.0
        return row


@dataclasses.dataclass(frozen=True)
class TaskSource:
    """Facts hidden in stretches of texts, and questions about them with their answers.

    A question stands anywhere behind the last of the facts it takes: near ones are learnt first, far
    ones are what memory is for. The last one stands near the end, not always at it.

    Attributes:
        name: of the task.
        language_weight: how much tokens of no answer count, by the length of the sequences.
        density: questions for 1,000 tokens, on average, likewise.
        reach: tokens that local attention sees exactly.
        noise: what some of the haystacks are made into.
        forms, keys: wordings, and names that facts go by, as `gemma_jax.tasks.make` knows them; an
            episode has one of each.
        loose: share of the episodes that are worded more freely than any form, see `wording.loosely`.
        more_questions: see `Task.asking_more`.
        packed: share of the sequences that hold as many facts and questions as there is room for, by
            their length.
    """

    name: str
    texts: tuple[Text, ...]
    encode: BatchEncoder
    bos_id: int
    language_weight: Ramp
    density: Ramp
    reach: int
    noise: Noise | None = None
    forms: tuple[str, ...] = ("train",)
    keys: tuple[str, ...] = ("train", "invented")
    loose: float = 0.0
    more_questions: int = 0
    packed: Ramp | None = None

    @property
    def files(self) -> list[str]:
        return _files(self.texts, self.noise)

    @functools.cached_property
    def shortest(self) -> int:
        """Tokens of a sequence that has room for most questions; sampled."""
        tokens = [_Items(self, seed, [0.0]).tokens for seed in range(TRIES)]
        return 2 + int(np.median(tokens))

    @functools.cached_property
    def _tasks(self) -> list[Task]:
        return [
            tasks.make(self.name, forms=forms, keys=keys).asking_more(self.more_questions)
            for forms, keys in itertools.product(self.forms, self.keys)
        ]

    def episode(self, seed: int, depths: list[float]) -> Episode:
        """In the wording and with the keys that the seed has."""
        episode = self._tasks[seed % len(self._tasks)].episode(seed, depths)
        rng = random.Random(f"wording:{seed}")
        return loosely(episode, rng) if rng.random() < self.loose else episode

    @property
    def says_what_to_keep(self) -> bool:
        """Whether its facts tell sentences that are to be kept from others."""
        return self.name not in SAYS_NOTHING

    @property
    def most_questions(self) -> int:
        """About one text."""
        return self._tasks[0].most_questions or MOST_QUESTIONS

    def row(self, rng: np.random.Generator, length: int) -> Row:
        density = self.density.at(length - 1) / 1000
        questions = max(1, round(density * length * rng.uniform(0.5, 1.5)))
        questions = 1 if rng.uniform() < ALONE else questions
        packed = self.packed is not None and rng.uniform() < self.packed.at(length - 1)
        if packed:
            questions = max(1, min(length // self.shortest, self.most_questions))
        spans = -(-questions // self.most_questions)
        strange = _is_strange(self.noise, rng)
        parts = [Part([self.bos_id])]
        filled = 1
        for i in range(spans):
            room = (length - filled) // (spans - i)
            share = 1.0 if packed else SHARE_OF_ITEMS
            wanted = max(1, questions // spans)
            parts += self._span(rng, room, wanted, share, last=i == spans - 1, strange=strange)
            filled += room
        language = 0.0 if strange else self.language_weight.at(length - 1)
        lengths = [len(part.ids) for part in parts]
        weights = [
            max(1.0, LEAST_ANSWER / n) if part.answer else language
            for part, n in zip(parts, lengths, strict=True)
        ]
        wanted = [part.wanted if self.says_what_to_keep else UNSAID for part in parts]
        return Row(
            _joined([part.ids for part in parts]),
            np.repeat(np.array(weights, np.float32), lengths),
            np.repeat([part.answer for part in parts], lengths),
            np.repeat(np.array(wanted, np.int8), lengths),
        )

    def _span(
        self,
        rng: np.random.Generator,
        length: int,
        wanted: int,
        share: float,
        *,
        last: bool,
        strange: bool,
    ) -> list[Part]:
        """One episode in exactly `length` tokens, of which several questions may take up a share."""
        items = self._that_fit(rng, length, np.sort(rng.uniform(0, 1, wanted)), share)
        if items is None:
            return [Part(haystack(self.texts).cut(rng, length)[0])]
        room = length - items.tokens
        tail = min(int(rng.integers(self.reach // 2 + 1)), room // 4) if last else 0
        places = items.places(rng, room - tail, self.reach)
        hay, starts = haystack(self.texts).cut(rng, room)
        if strange:
            hay = self.noise.make(rng, hay)
        parts = [Part(items.opening)]
        put, done = items.parts, 0
        for i in np.argsort(places, kind="stable"):
            at = _at_sentence(starts, int(places[i]), done)
            parts += [Part(hay[done:at]), *put[i]]
            done = at
        return [*parts, Part(hay[done:])]

    def asked_at_the_end(
        self, rng: np.random.Generator, length: int, questions: int, beyond: int
    ) -> tuple[np.ndarray, list[tuple[list[int], list[int]]]]:
        """A text [length] to be read once, and questions about it with their answers, as ids.

        What they take stands more than `beyond` tokens from the end, where the text is long enough.

        Raises:
            UsageError: the text is too short for a question.
        """
        depths = np.sort(rng.uniform(0, max(length - beyond, 0) / length or 1.0, questions))
        items = self._that_fit(rng, length - 1, depths, SHARE_OF_ITEMS)
        if items is None:
            raise UsageError(
                f"{length} tokens are too few to ask about {self.name}: choose longer --probe-lengths."
            )
        room = length - 1 - items.tokens_read
        hay, starts = haystack(self.texts).cut(rng, room)
        parts: list[Any] = [[self.bos_id], items.opening]
        done = 0
        for fact, depth in zip(items.facts, items.depths, strict=True):
            at = _at_sentence(starts, int(depth * room), done)
            parts += [hay[done:at], fact]
            done = at
        return _joined([*parts, hay[done:]]), items.asked

    def _that_fit(
        self, rng: np.random.Generator, length: int, depths: np.ndarray, share: float
    ) -> "_Items | None":
        """The items of an episode with as many of the depths as there is room for; None: not one.

        Episodes are of different lengths, so a few are tried.
        """
        for _ in range(TRIES):
            items = _Items(self, int(rng.integers(SEEDS)), depths.tolist())
            limit = length if len(depths) == 1 else int(share * length)
            if items.tokens <= limit:
                return items
            fewer = max(1, min(len(depths) - 1, len(depths) * limit // items.tokens))
            depths = depths[np.linspace(0, len(depths) - 1, fewer).astype(int)]
        return None


class _Items:
    """What of an episode is put into a haystack, as ids: facts, and questions with their answers.

    Attributes:
        opening: stands before everything.
        facts: in their order, with their `depths`.
        asked: questions and their answers.
        tokens: of all that; `tokens_read` without what is asked.
    """

    def __init__(self, source: TaskSource, seed: int, depths: list[float]):
        self._episode: Episode = source.episode(seed, depths)
        facts, asked = self._episode.facts, self._episode.questions
        texts = [self._episode.opening, *(fact.text for fact in facts)]
        texts += [question.text for question in asked]
        texts += [question.reply.removesuffix(STOP) for question in asked]
        texts += [STOP]
        ids = source.encode(texts)
        self.opening = ids[0]
        questions_at, answers_at = 1 + len(facts), 1 + len(facts) + len(asked)
        self.facts = ids[1:questions_at]
        self.depths = [fact.depth for fact in facts]
        self.asked = list(zip(ids[questions_at:answers_at], ids[answers_at:-1], strict=True))
        self._stop = ids[-1]
        self.tokens = sum(map(len, ids[:-1])) + len(asked) * len(self._stop)
        self.tokens_read = sum(map(len, ids[:questions_at]))

    @property
    def parts(self) -> list[list[Part]]:
        """Facts, and what is asked."""
        stop = Part(self._stop, wanted=UNSAID)  # no part of the answer: nobody has to remember it
        asked = [
            [Part(question, wanted=UNSAID), Part(answer, answer=True, wanted=UNSAID), stop]
            for question, answer in self.asked
        ]
        return [[Part(fact, wanted=KEEP)] for fact in self.facts] + asked

    def places(self, rng: np.random.Generator, room: int, reach: int) -> np.ndarray:
        """How much haystack, of `room` tokens, stands before each of `parts`."""
        facts = np.array(self.depths) * room
        asked = []
        for question in self._episode.questions:
            known = max((facts[i] for i in question.facts), default=0.0)
            where = rng.uniform()
            end = min(room, known + reach) if where < NEAR else room
            asked.append(room if where > 1.0 - AT_THE_END else rng.uniform(known, end))
        if asked:
            asked[int(rng.integers(len(asked)))] = room
        return np.concatenate([facts, np.array(asked)])


def _at_sentence(starts: np.ndarray, place: int, low: int) -> int:
    """The last sentence start at or before a place, and not before `low`."""
    index = int(np.searchsorted(starts, place, side="right")) - 1
    return max(low, int(starts[index]) if index >= 0 else 0)


def _joined(parts: Sequence[Any]) -> np.ndarray:
    return np.concatenate([np.asarray(part, np.int32) for part in parts])


@functools.lru_cache(maxsize=16)
def _record_book(records: Records) -> RecordBook:
    return RecordBook(records)
