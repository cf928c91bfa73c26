"""A grid: which haystacks are read, what is asked about each, and which are read together.

Everything is planned, and checked, before anything is read; nothing here touches a model. Two plans of
the same options are equal on every machine.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Sequence

from gemma_jax.config import GemmaConfig
from gemma_jax.errors import UsageError
from gemma_jax.evaluate.haystack import Haystack, Text, ask
from gemma_jax.tasks.base import EncodeBatch, Task

SHARED_FROM = 100_000  # tokens; from here on one haystack is read for many questions
QUESTION_MULTIPLE = 16  # questions are padded to one length for the whole grid
SHARED = ("auto", "always", "never")
# Weights (layers * D * M) up to which shared haystacks are read side by side: a row of a larger model
# keeps a GPU busy, and its State is large.
BUSY_WEIGHTS = 50_000_000


@dataclasses.dataclass(frozen=True)
class Options:
    """What a grid is made of.

    Attributes:
        depths: shares of the filler before a fact, 0 to 1.
        trials: questions per cell where each has a haystack of its own.
        questions: questions per cell where haystacks are shared.
        haystacks: over which these are spread, per task and length.
        books: paths of texts to make filler of.
        rows: haystacks with a question each, or questions, that are worked on together at most.
        beside: shared haystacks that are read together at most.
    """

    tasks: tuple[Task, ...]
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    trials: int
    questions: int
    haystacks: int
    shared: str
    seed: int
    books: tuple[str, ...]
    rows: int
    beside: int = 1


@dataclasses.dataclass(frozen=True)
class Group:
    """Haystacks of one task and length read together: `rows` of them with a question each, or `beside`
    shared ones."""

    haystacks: tuple[Haystack, ...]
    shared: bool

    @property
    def tokens(self) -> int:
        """Read at most."""
        return sum(haystack.tokens for haystack in self.haystacks)


@dataclasses.dataclass(frozen=True)
class Grid:
    """The whole plan."""

    groups: tuple[Group, ...]
    rows: int  # worked on together
    beside: int  # shared haystacks read together
    question_tokens: int  # of the longest question, rounded up
    encode_batch: EncodeBatch = dataclasses.field(repr=False)
    books: tuple[str, ...]
    bos_id: int

    @property
    def haystacks(self) -> Iterator[Haystack]:
        return itertools.chain.from_iterable(group.haystacks for group in self.groups)

    def text(self, haystack: Haystack) -> Text:
        """The haystack, to be read."""
        return Text(haystack, self.books, self.encode_batch, self.bos_id)


def plan(options: Options, encode_batch: EncodeBatch, bos_id: int) -> Grid:
    """Plans a grid.

    Raises:
        UsageError: a length is too short for what it must hold, or a task cannot ask so much.
    """
    if options.questions < options.haystacks:
        raise UsageError(
            f"--haystacks {options.haystacks} cannot share {options.questions} questions: choose"
            " more --questions or fewer --haystacks."
        )
    beside = balanced(options.haystacks, min(options.beside, options.rows))
    rows = max(balanced(count, options.rows) for count in counts(options, beside))
    groups: list[Group] = []
    for length, task in itertools.product(options.lengths, options.tasks):
        if is_shared(options, task, length):
            found = list(shared(options, task, length, encode_batch))
            groups += grouped(found, beside, shared=True)
        else:
            found = list(alone(options, task, length, encode_batch))
            groups += grouped(found, rows, shared=False)
    longest = max(
        len(asked.ids)
        for group in groups
        for haystack in group.haystacks
        for asked in haystack.asked
    )
    padded = -(-longest // QUESTION_MULTIPLE) * QUESTION_MULTIPLE
    grid = Grid(tuple(groups), rows, beside, padded, encode_batch, options.books, bos_id)
    for haystack in grid.haystacks:
        try:
            grid.text(haystack)
        except UsageError as error:
            raise UsageError(
                f"--lengths {haystack.tokens} is too short: beside BOS and the question, {error}"
            ) from error
    return grid


def rows_to_be_busy(config: GemmaConfig, most: int) -> int:
    """Rows, at most `most`, in which a model best reads shared haystacks: as many as keep a GPU busy."""
    weights = config.num_layers * config.width * config.mlp_dim
    return min(most, max(BUSY_WEIGHTS // weights, 1))


def grouped(haystacks: Sequence[Haystack], size: int, *, shared: bool) -> Iterator[Group]:
    """Groups of at most `size`."""
    for at in range(0, len(haystacks), size):
        yield Group(tuple(haystacks[at : at + size]), shared)


def counts(options: Options, beside: int) -> set[int]:
    """Of texts, or of questions about those read together, that wait to be worked on together."""
    each = -(-options.questions // options.haystacks) * beside
    return {
        len(options.depths) * (each if is_shared(options, task, length) else options.trials)
        for length, task in itertools.product(options.lengths, options.tasks)
    }


def balanced(count: int, most: int) -> int:
    """Rows, at most `most`, that `count` items fill evenly."""
    return -(-count // -(-count // most))


def is_shared(options: Options, task: Task, length: int) -> bool:
    """Whether haystacks of a length are read once for many questions; by default only where the task
    can ask so many about one text."""
    if options.shared != "auto":
        return options.shared == "always"
    each = len(options.depths) * -(-options.questions // options.haystacks)
    return length >= SHARED_FROM and each <= (task.most_questions or each)


def alone(
    options: Options, task: Task, length: int, encode_batch: EncodeBatch
) -> Iterator[Haystack]:
    """A haystack for each trial, depth by depth."""
    for depth, trial in itertools.product(options.depths, range(options.trials)):
        name = f"{task.name}-{length}-{100 * depth:.12g}%-{trial}"
        yield _haystack(options, task, length, name, (depth,), 1, encode_batch)


def shared(
    options: Options, task: Task, length: int, encode_batch: EncodeBatch
) -> Iterator[Haystack]:
    """Haystacks with facts at all depths."""
    each, more = divmod(options.questions, options.haystacks)
    for index in range(options.haystacks):
        name = f"{task.name}-{length}-shared-{index}"
        questions = each + (index < more)
        yield _haystack(options, task, length, name, options.depths, questions, encode_batch)


def _haystack(
    options: Options,
    task: Task,
    length: int,
    name: str,
    depths: Sequence[float],
    questions: int,
    encode_batch: EncodeBatch,
) -> Haystack:
    episode = task.episode(seed_of(options.seed, name), depths, questions)
    asked = ask(episode, encode_batch)
    haystack = Haystack(name, task, length, episode, asked)
    if haystack.room < 1:
        raise UsageError(
            f"{length} tokens are too few for {task.name}, whose question alone takes"
            f" {length - haystack.room}: choose a greater length."
        )
    return haystack


def seed_of(seed: int, name: str) -> int:
    """A seed for each haystack, which depends on nothing else in the grid."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "big") >> 1
