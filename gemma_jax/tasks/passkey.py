"""Passkeys: numbers of five digits in a text about something else.

With one question a text has the classic single passkey; with more, every passkey belongs to something
that has a name, as `the amber falcon`.
"""

import random
from collections.abc import Iterable, Iterator, Sequence

from gemma_jax.tasks import haystacks, scoring, words
from gemma_jax.tasks.base import Draft, Episode, Piece, Question, Task, spread
from gemma_jax.tasks.forms import PASSKEY

HAYSTACKS = ("grass", "books")
OPENING = (
    "Somewhere in the long text below something important is said that has nothing to do with the rest of"
    " it. Find it and remember it: there will be questions about it."
)


class Passkey(Task):
    """One passkey, or many with names of their own."""

    name = "passkey"
    chance = 1 / 90_000

    def __init__(self, forms: str, keys: str, haystack: str):
        self._forms, self._keys, self.haystack = PASSKEY[forms], keys, haystack

    def episode(self, seed: int, depths: Sequence[float], questions_per_depth: int = 1) -> Episode:
        rng = random.Random(f"{self.name}:{seed}")
        places = spread(depths, questions_per_depth, rng)
        owners = words.take(words.keys(rng, self._keys), len(places), "names")
        values = words.take(words.numbers(rng, 5), len(places), "numbers")
        draft = Draft(self.name, seed, OPENING)
        for (asked, depth), owner, value in zip(places, owners, values, strict=True):
            filled = {
                "what": rng.choice(self._forms.names),
                "of": f" of the {owner}" if len(places) > 1 else "",
                "value": value,
            }
            fact = draft.fact(rng.choice(self._forms.facts).format(**filled), depth)
            question = rng.choice(self._forms.questions).format(**filled)
            draft.ask(question, [value], [fact], asked)
        return draft.episode()

    def filler(self, episode: Episode, books: Iterable[str]) -> Iterator[Piece]:
        return haystacks.stream(self.haystack, books, f"{self.name}:{episode.seed}:books")

    def score(self, question: Question, answer: str) -> float:
        return scoring.share_found(answer, question.answers, scoring.NUMBER)


def make(name: str, *, forms: str, keys: str, haystack: str | None) -> Passkey:
    """The task with its options."""
    return Passkey(forms, keys, haystack or "grass")
