"""Which words were frequent? Common and frequent words, after RULER.

The text is a list of words that no language has. The words asked for are facts, one for each time they
occur: the last of them stands at the question's depth, the others anywhere before it. Every other word
of the list occurs at most `rare` times, so the answer does not depend on the length of the text.

| task | asked for | how often they occur | others |
|---|---|---|---|
| `common_words` | the ten most common words | 30 times each | at most 3 times |
| `frequent_words` | the three most frequent words | by Zipf's law: 120, 30, 13, 7, 5, 3 | at most twice |
"""

import dataclasses
import itertools
import random
from collections.abc import Iterable, Iterator, Sequence

from gemma_jax.errors import UsageError
from gemma_jax.tasks import scoring, words
from gemma_jax.tasks.base import Draft, Episode, Piece, Question, Task, spread
from gemma_jax.tasks.forms import FREQUENCIES

HAYSTACKS = ("words",)
_POOL = 40  # rare words that are in use at a time


@dataclasses.dataclass(frozen=True)
class Kind:
    """What distinguishes the two tasks."""

    counts: tuple[int, ...]  # of the words that are not rare
    asked: int  # for how many of them
    rare: int  # times that any other word occurs at most


KINDS = {
    "common_words": Kind(counts=(30,) * 10, asked=10, rare=3),
    "frequent_words": Kind(counts=(120, 30, 13, 7, 5, 3), asked=3, rare=2),
}
OPENING = (
    "Below is a long list of words of a language that nobody speaks. Some of them occur much more often than"
    " the others. Remember which: there will be a question about them.\n\nThe list:"
)
_NUMBERS = {3: "three", 10: "ten"}


class Frequencies(Task):
    """One of the two tasks; a text has one question, as there is one answer to it."""

    most_questions = 1
    haystack = "words"

    def __init__(self, name: str, forms: str):
        self.name, self._kind, self._forms = name, KINDS[name], FREQUENCIES[forms]

    def episode(self, seed: int, depths: Sequence[float], questions_per_depth: int = 1) -> Episode:
        rng = random.Random(f"{self.name}:{seed}")
        places = spread(depths, questions_per_depth, rng)
        if len(places) > self.most_questions:
            raise UsageError(
                f"{self.name} can ask one question about a text, not {len(places)}: give it one depth and"
                " one question per depth, and a text of its own for every question."
            )
        (asked, depth) = places[0]
        some = words.take(self._words(seed), len(self._kind.counts), "words")
        wanted = some[: self._kind.asked]
        times = zip(some, self._kind.counts, strict=True)
        occurrences = [word for word, count in times for _ in range(count)]
        rng.shuffle(occurrences)
        last = max(index for index, word in enumerate(occurrences) if word in wanted)
        occurrences.append(occurrences.pop(last))
        wheres = [*sorted(rng.random() * depth for _ in occurrences[1:]), depth]
        draft = Draft(self.name, seed, OPENING)
        facts = [
            draft.fact(f" {word}", where) for word, where in zip(occurrences, wheres, strict=True)
        ]
        needed = [fact for fact, word in zip(facts, occurrences, strict=True) if word in wanted]
        question = rng.choice(self._forms.questions).format(count=_NUMBERS[self._kind.asked])
        draft.ask(question, wanted, needed, asked)
        return draft.episode()

    def filler(self, episode: Episode, books: Iterable[str]) -> Iterator[Piece]:
        """Rare words; one of them is drawn from a few, and replaced after its last time."""
        rng = random.Random(f"{self.name}:{episode.seed}:rare")
        new = itertools.islice(self._words(episode.seed), len(self._kind.counts), None)
        pool: list[str] = []
        times = [self._kind.rare] * _POOL
        for word in new:
            if len(pool) < _POOL:
                pool.append(word)
                continue
            while True:
                index = rng.randrange(_POOL)
                times[index] -= 1
                yield Piece(f" {pool[index]}")
                if not times[index]:
                    pool[index], times[index] = word, self._kind.rare
                    break

    def score(self, question: Question, answer: str) -> float:
        return scoring.share_found(answer, question.answers, rf"\b{words.CODED_WORD}\b")

    def _words(self, seed: int) -> Iterator[str]:
        return words.coded_words(random.Random(f"{self.name}:{seed}:words"))


def make(name: str, *, forms: str, keys: str, haystack: str | None) -> Frequencies:
    """The task with its options."""
    return Frequencies(name, forms)
