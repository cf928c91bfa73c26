"""Needles in a haystack, after RULER: keys, each with a magic number or UUID, and the eight kinds of asking.

| task | haystack | key -> value | beside what is asked for |
|---|---|---|---|
| `niah_single_1` | grass | words -> number | |
| `niah_single_2` | books | words -> number | |
| `niah_single_3` | books | words -> UUID | |
| `niah_multikey_1` | books | words -> number | three needles more |
| `niah_multikey_2` | needles | words -> number | the haystack is other needles |
| `niah_multikey_3` | needles | UUID -> UUID | the same |
| `niah_multivalue` | books | words -> four numbers | |
| `niah_multiquery` | books | four keys at once -> numbers | |

With several questions about one text the needles of the others are distractors as well.
"""

import dataclasses
import itertools
import random
from collections.abc import Iterable, Iterator, Sequence

from gemma_jax.tasks import haystacks, scoring, words
from gemma_jax.tasks.base import Draft, Episode, Piece, Question, Task, spread
from gemma_jax.tasks.forms import NEEDLES

HAYSTACKS = ("grass", "books", "needles")
DIGITS = 7
OPENING = (
    "Some special magic {kind}s are hidden in the text below. Remember them: there will be questions about"
    " them."
)


@dataclasses.dataclass(frozen=True)
class Kind:
    """What distinguishes one task of the family."""

    haystack: str
    keys: str = "words"
    values: str = "number"
    extra_needles: int = 0
    values_per_key: int = 1
    keys_per_question: int = 1


KINDS = {
    "niah_single_1": Kind("grass"),
    "niah_single_2": Kind("books"),
    "niah_single_3": Kind("books", values="UUID"),
    "niah_multikey_1": Kind("books", extra_needles=3),
    "niah_multikey_2": Kind("needles"),
    "niah_multikey_3": Kind("needles", keys="UUID", values="UUID"),
    "niah_multivalue": Kind("books", values_per_key=4),
    "niah_multiquery": Kind("books", keys_per_question=4),
}


class Needles(Task):
    """One task of the family."""

    def __init__(self, name: str, forms: str, keys: str, haystack: str | None):
        self.name, self._kind = name, KINDS[name]
        self._keys, self.haystack = keys, haystack or self._kind.haystack
        several = self._kind.values_per_key > 1
        several_asked = several or self._kind.keys_per_question > 1
        wording = NEEDLES[forms]
        self._facts = wording.facts_of_several if several else wording.facts
        self._questions = wording.questions_of_several if several_asked else wording.questions

    def episode(self, seed: int, depths: Sequence[float], questions_per_depth: int = 1) -> Episode:
        """The last of a question's needles stands at its depth, the others anywhere before it."""
        kind, rng = self._kind, random.Random(f"{self.name}:{seed}")
        places = spread(depths, questions_per_depth, rng)
        count = len(places) * kind.keys_per_question + kind.extra_needles
        spare = 1 if self.haystack == "needles" else 0  # of which there must be some
        keys = iter(words.take(self._key_stream(seed), count + spare, "keys")[:count])
        values = self._values(rng)
        draft = Draft(self.name, seed, OPENING.format(kind=kind.values))
        for asked, depth in places:
            asked_keys = list(itertools.islice(keys, kind.keys_per_question))
            needles = [
                (key, next(values)) for key in asked_keys for _ in range(kind.values_per_key)
            ]
            wheres = [*sorted(rng.random() * depth for _ in needles[1:]), depth]
            if kind.keys_per_question > 1:  # the answers' order is the question's, not the text's
                rng.shuffle(wheres)
            facts = [
                draft.fact(self._needle(rng, *needle), where)
                for needle, where in zip(needles, wheres, strict=True)
            ]
            question = rng.choice(self._questions).format(key=_listed(asked_keys), kind=kind.values)
            draft.ask(question, [value for _, value in needles], facts, asked)
        for key in keys:
            draft.fact(self._needle(rng, key, next(values)), rng.random())
        return draft.episode()

    def filler(self, episode: Episode, books: Iterable[str]) -> Iterator[Piece]:
        if self.haystack == "needles":
            return self._distractors(episode)
        return haystacks.stream(self.haystack, books, f"{self.name}:{episode.seed}:books")

    def score(self, question: Question, answer: str) -> float:
        pattern = scoring.NUMBER if self._kind.values == "number" else scoring.UUID
        return scoring.share_found(answer, question.answers, pattern)

    def _distractors(self, episode: Episode) -> Iterator[Piece]:
        """Needles with keys that are never asked for; the keys return, with other values, after all
        of them were there."""
        rng = random.Random(f"{self.name}:{episode.seed}:distractors")
        values = self._values(rng)
        used = len(episode.facts) // self._kind.values_per_key
        while True:
            for key in itertools.islice(self._key_stream(episode.seed), used, None):
                yield Piece(self._needle(rng, key, next(values)))

    def _needle(self, rng: random.Random, key: str, value: str) -> str:
        return rng.choice(self._facts).format(key=key, value=value, kind=self._kind.values)

    def _key_stream(self, seed: int) -> Iterator[str]:
        rng = random.Random(f"{self.name}:{seed}:keys")
        if self._kind.keys == "UUID":
            return words.uuids(rng)
        return (key.replace(" ", "-") for key in words.keys(rng, self._keys))

    def _values(self, rng: random.Random) -> Iterator[str]:
        if self._kind.values == "UUID":
            return words.uuids(rng)
        return itertools.chain.from_iterable(
            words.numbers(rng, DIGITS) for _ in itertools.repeat(None)
        )


def _listed(keys: list[str]) -> str:
    return keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])} and {keys[-1]}"


def make(name: str, *, forms: str, keys: str, haystack: str | None) -> Needles:
    """The task with its options."""
    return Needles(name, forms, keys, haystack)
