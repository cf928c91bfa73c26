"""Facts of several tasks in one long text, all of them further back than local attention reaches."""

import dataclasses
import random
from collections.abc import Mapping, Sequence

from gemma_jax import tasks
from gemma_jax.errors import UsageError
from gemma_jax.evaluate.haystack import Asked, Haystack, Text, ask
from gemma_jax.tasks.base import Draft, EncodeBatch, Episode, Task

MARGIN_TOKENS = 512  # between the last fact that is asked for and what local attention reaches


@dataclasses.dataclass(frozen=True)
class Planted:
    """A text with facts in it, and the questions about them.

    Attributes:
        haystack: of all tasks together.
        tasks: by question: the one that it is of.
        reach: how far before the end of what is read local attention sees, in tokens.
    """

    haystack: Haystack
    tasks: tuple[Task, ...]
    reach: int
    books: tuple[str, ...]
    encode_batch: EncodeBatch = dataclasses.field(repr=False)
    bos_id: int

    @property
    def asked(self) -> tuple[Asked, ...]:
        return self.haystack.asked

    def text(self) -> Text:
        """The text, to be read once; every call gives the same."""
        return Text(self.haystack, self.books, self.encode_batch, self.bos_id)

    def facts(self, asked: Asked) -> list[str]:
        """The sentences that it takes to answer."""
        facts = self.haystack.episode.facts
        return [facts[index].text.strip() for index in asked.question.facts]

    @property
    def others(self) -> int:
        """Facts that no question needs."""
        needed = {index for asked in self.asked for index in asked.question.facts}
        return len(self.haystack.episode.facts) - len(needed)


def plant(
    wanted: Mapping[str, int],
    *,
    tokens: int,
    seed: int,
    reach: int,
    books: Sequence[str],
    encode_batch: EncodeBatch,
    bos_id: int,
) -> Planted:
    """Plans a text of at most `tokens` tokens, BOS and the longest question included.

    Args:
        wanted: names of tasks that can be hidden in books, and how many questions each asks.
        reach: tokens before the end of what is read that local attention sees.
        books: paths of what the text is made of.

    Raises:
        UsageError: there is no such task, two of them could contradict each other, one cannot ask so
            much, or the text is too short.
    """
    made = {name: tasks.make(name, haystack="books") for name in wanted}
    if len({type(task) for task in made.values()}) < len(made):
        raise UsageError(
            f"{' and '.join(made)} tell of the same things, so their facts would contradict each other:"
            " choose one task of a family."
        )
    least = 2 * (reach + MARGIN_TOKENS)
    if tokens < least:
        raise UsageError(
            f"--tokens {tokens} is too short: local attention alone reaches {reach} tokens back, so"
            f" choose {least} or more."
        )
    furthest = 1 - (reach + MARGIN_TOKENS) / tokens
    episode, owners = mix(made, wanted, seed, furthest)
    haystack = Haystack("demo", owners[0], tokens, episode, ask(episode, encode_batch))
    planted = Planted(haystack, owners, reach, tuple(books), encode_batch, bos_id)
    planted.text()  # raises where the facts do not fit
    return planted


def mix(
    made: Mapping[str, Task], wanted: Mapping[str, int], seed: int, furthest: float
) -> tuple[Episode, tuple[Task, ...]]:
    """One episode of several tasks, its questions' facts spread evenly up to the depth `furthest`.

    Returns:
        The episode, and by question the task that it is of.
    """
    rng, count = random.Random(f"demo:{seed}"), sum(wanted.values())
    depths = [furthest * (index + rng.random()) / count for index in range(count)]
    rng.shuffle(depths)
    episodes = {
        name: task.episode(seed, sorted(depths.pop() for _ in range(wanted[name])))
        for name, task in made.items()
    }
    openings = dict.fromkeys(episode.opening for episode in episodes.values())
    draft = Draft("demo", seed, " ".join(openings))
    owners = []
    for name, episode in episodes.items():
        numbers = [draft.fact(fact.text, fact.depth) for fact in episode.facts]
        for question in episode.questions:
            facts = [numbers[index] for index in question.facts]
            draft.ask(question.text, question.answers, facts, question.depth)
            owners.append(made[name])
    return draft.episode(), tuple(owners)
