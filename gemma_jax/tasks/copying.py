"""Lines that come again: what followed a word the first time follows it the second time.

No benchmark: repeating is what a model from scratch has to learn before it can recall anything by a key
(the induction of Olsson et al. 2022, "In-context Learning and Induction Heads").
"""

import random
from collections.abc import Iterable, Iterator, Sequence

from gemma_jax.tasks import haystacks, scoring, words
from gemma_jax.tasks.base import Draft, Episode, Piece, Question, Task, spread
from gemma_jax.tasks.forms import COPY

HAYSTACKS = ("books", "grass")
SHORTEST, LONGEST = 2, 6  # of a line, in words, beside the first
MOST_DIGITS = 7  # of a word that is a number
SHARE_OF_NUMBERS = 0.5


class Copy(Task):
    """Lines of random words and numbers; each begins with a word that no other has."""

    name = "copy"

    def __init__(self, forms: str, keys: str, haystack: str):
        self._forms, self.haystack = COPY[forms], haystack
        self._words = words.of_split(words.NOUNS, keys)

    def episode(self, seed: int, depths: Sequence[float], questions_per_depth: int = 1) -> Episode:
        rng = random.Random(f"{self.name}:{seed}")
        places = spread(depths, questions_per_depth, rng)
        firsts = words.take(words.coded_words(rng), len(places), "words")
        draft = Draft(self.name, seed)
        for (asked, depth), first in zip(places, firsts, strict=True):
            rest = " ".join(self._word(rng) for _ in range(rng.randint(SHORTEST, LONGEST)))
            fact = draft.fact(rng.choice(self._forms.facts).format(first=first, rest=rest), depth)
            question = rng.choice(self._forms.questions).format(first=first)
            draft.ask(question, [rest], [fact], asked)
        return draft.episode()

    def filler(self, episode: Episode, books: Iterable[str]) -> Iterator[Piece]:
        return haystacks.stream(self.haystack, books, f"{self.name}:{episode.seed}:books")

    def score(self, question: Question, answer: str) -> float:
        """The line must be repeated word by word."""
        wanted = question.answers[0].split()
        return float(scoring.normal(answer).rstrip(".").split()[: len(wanted)] == wanted)

    def _word(self, rng: random.Random) -> str:
        if rng.random() < SHARE_OF_NUMBERS:
            return str(rng.randrange(10 ** rng.randint(1, MOST_DIGITS)))
        return rng.choice(self._words)


def make(name: str, *, forms: str, keys: str, haystack: str | None) -> Copy:
    """The task with its options."""
    return Copy(forms, keys, haystack or "books")
