"""Multi-query associative recall: a list of pairs of words, then some of the keys again, one by one.

The haystack is pairs of the same kind that are never asked for. Keys are words that no language has,
values are common nouns, of which there are few, so that a guess is sometimes right.
"""

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence

from gemma_jax.tasks import haystacks, scoring, words
from gemma_jax.tasks.base import Draft, Episode, Piece, Question, Task, spread
from gemma_jax.tasks.forms import RECALL

HAYSTACKS = ("needles", "books", "grass")
VALUES = tuple(words.NOUNS[::6][:64])
OPENING = "Below, every word on the left goes with one word on the right.\n"


class AssociativeRecall(Task):
    """Pairs in one wording a text."""

    name = "mqar"
    chance = 1 / len(VALUES)
    vocabulary = VALUES

    def __init__(self, forms: str, haystack: str):
        self._forms, self.haystack = RECALL[forms], haystack

    def episode(self, seed: int, depths: Sequence[float], questions_per_depth: int = 1) -> Episode:
        rng = random.Random(f"{self.name}:{seed}")
        places = spread(depths, questions_per_depth, rng)
        keys = words.take(self._keys(seed), len(places), "words")
        fact_form, question_form = self._wording(seed)
        draft = Draft(self.name, seed, OPENING)
        for (asked, depth), key in zip(places, keys, strict=True):
            value = rng.choice(VALUES)
            fact = draft.fact(fact_form.format(key=key, value=value), depth)
            draft.ask(question_form.format(key=key), [value], [fact], asked)
        return draft.episode()

    def filler(self, episode: Episode, books: Iterable[str]) -> Iterator[Piece]:
        if self.haystack == "needles":
            return self._distractors(episode)
        return haystacks.stream(self.haystack, books, f"{self.name}:{episode.seed}:books")

    def score(self, question: Question, answer: str) -> float:
        return scoring.share_found(answer, question.answers, scoring.one_of(VALUES))

    def _distractors(self, episode: Episode) -> Iterator[Piece]:
        rng = random.Random(f"{self.name}:{episode.seed}:distractors")
        form, _ = self._wording(episode.seed)
        for key in itertools.islice(self._keys(episode.seed), len(episode.facts), None):
            yield Piece(form.format(key=key, value=rng.choice(VALUES)))

    def _wording(self, seed: int) -> tuple[str, str]:
        pairs = list(zip(self._forms.facts, self._forms.questions, strict=True))
        return random.Random(f"{self.name}:{seed}:wording").choice(pairs)

    def _keys(self, seed: int) -> Iterator[str]:
        return words.coded_words(random.Random(f"{self.name}:{seed}:keys"))


def make(name: str, *, forms: str, keys: str, haystack: str | None) -> AssociativeRecall:
    """The task with its options; keys are never met again in another text, so none are held out."""
    return AssociativeRecall(forms, haystack or "needles")
