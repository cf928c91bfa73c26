"""Variable tracking, after RULER: `VAR B = VAR A` in a chain, hops apart, and which variables have the value.

A question's chain stands in its order; its last assignment is at the question's depth, the others
anywhere before it. Chains of other questions distract, and with `haystack="books"` so does the text.
"""

import random
import string
from collections.abc import Iterable, Iterator, Sequence

from gemma_jax.tasks import haystacks, scoring, words
from gemma_jax.tasks.base import Draft, Episode, Piece, Question, Task, spread
from gemma_jax.tasks.forms import VARIABLES

HAYSTACKS = ("grass", "books")
HOPS = 4
LETTERS = 5  # of a variable's name
DIGITS = 5
OPENING = (
    "Variables are given values in the text below, some by way of other variables. Keep track of them: there"
    " will be questions about them."
)
_LETTERS = {
    "train": string.ascii_uppercase[::2],
    "invented": string.ascii_uppercase[::2],
    "held_out": string.ascii_uppercase[1::2],
    "all": string.ascii_uppercase,
}


class VariableTracking(Task):
    """Chains of `HOPS` hops, one for each question."""

    name = "variable_tracking"

    def __init__(self, forms: str, keys: str, haystack: str):
        self._forms, self._letters, self.haystack = VARIABLES[forms], _LETTERS[keys], haystack

    def episode(self, seed: int, depths: Sequence[float], questions_per_depth: int = 1) -> Episode:
        rng = random.Random(f"{self.name}:{seed}")
        places = spread(depths, questions_per_depth, rng)
        variables = self._variables(rng)
        values = words.take(words.numbers(rng, DIGITS), len(places), "numbers")
        draft = Draft(self.name, seed, OPENING)
        for (asked, depth), value in zip(places, values, strict=True):
            chain = words.take(variables, HOPS + 1, "variables")
            first, later = rng.choice(self._forms.facts), rng.choice(self._forms.facts_of_several)
            wheres = [*sorted(rng.random() * depth for _ in range(HOPS)), depth]
            sources = [value, *chain]
            facts = [
                draft.fact(form.format(name=name, source=source), where)
                for form, name, source, where in zip(
                    [first, *[later] * HOPS], chain, sources, wheres, strict=False
                )
            ]
            draft.ask(rng.choice(self._forms.questions).format(value=value), chain, facts, asked)
        return draft.episode()

    def filler(self, episode: Episode, books: Iterable[str]) -> Iterator[Piece]:
        return haystacks.stream(self.haystack, books, f"{self.name}:{episode.seed}:books")

    def score(self, question: Question, answer: str) -> float:
        pattern = rf"\b[A-Z]{{{LETTERS}}}\b"
        return scoring.share_found(answer, question.answers, pattern, match_case=True)

    def _variables(self, rng: random.Random) -> Iterator[str]:
        count = len(self._letters)
        for index in words.permutation(rng, count**LETTERS):
            yield "".join(self._letters[index // count**place % count] for place in range(LETTERS))


def make(name: str, *, forms: str, keys: str, haystack: str | None) -> VariableTracking:
    """The task with its options."""
    return VariableTracking(forms, keys, haystack or "grass")
