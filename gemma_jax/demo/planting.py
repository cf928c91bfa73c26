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


def make_tasks(wanted: Mapping[str, int]) -> tuple[tuple[Task, int], ...]:
    """Tasks by name, each with how many questions it asks.

    Raises:
        UsageError: there is no such task, it cannot be hidden in books, or two of them could contradict
            each other.
    """
    made = tuple((tasks.make(name, haystack="books"), count) for name, count in wanted.items())
    if len({type(task) for task, _ in made}) < len(made):
        raise UsageError(
            f"{', '.join(wanted)}: two of these tell of the same things, so their facts would contradict"
            " each other; choose one of a family."
        )
    return made


def plant(
    made: Sequence[tuple[Task, int]],
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
        made: see `make_tasks`.
        reach: tokens before the end of what is read that local attention sees.
        books: paths of what the text is made of.

    Raises:
        UsageError: a task cannot ask so much, or the text is too short.
    """
    least = 2 * (reach + MARGIN_TOKENS)
    if tokens < least:
        raise UsageError(
            f"--tokens {tokens} is too short: local attention alone reaches {reach} tokens back, so"
            f" choose {least} or more."
        )
    furthest = 1 - (reach + MARGIN_TOKENS) / tokens
    episode, owners = mix(made, seed, furthest)
    haystack = Haystack("demo", owners[0], tokens, episode, ask(episode, encode_batch))
    planted = Planted(haystack, owners, reach, tuple(books), encode_batch, bos_id)
    planted.text()  # raises where the facts do not fit
    return planted


def mix(
    made: Sequence[tuple[Task, int]], seed: int, furthest: float
) -> tuple[Episode, tuple[Task, ...]]:
    """One episode of several tasks, its questions' facts spread evenly up to the depth `furthest`.

    Returns:
        The episode, and by question the task that it is of.
    """
    rng, total = random.Random(f"demo:{seed}"), sum(count for _, count in made)
    depths = [furthest * (index + rng.random()) / total for index in range(total)]
    rng.shuffle(depths)
    episodes = [
        task.episode(seed, sorted(depths.pop() for _ in range(count))) for task, count in made
    ]
    draft = Draft("demo", seed, " ".join(episode.opening for episode in episodes))
    owners: list[Task] = []
    for (task, _), episode in zip(made, episodes, strict=True):
        numbers = [draft.fact(fact.text, fact.depth) for fact in episode.facts]
        for question in episode.questions:
            facts = [numbers[index] for index in question.facts]
            draft.ask(question.text, question.answers, facts, question.depth)
            owners.append(task)
    return draft.episode(), tuple(owners)
