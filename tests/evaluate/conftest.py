"""A tiny task, and the tiny random model that is asked."""

import dataclasses
import itertools
import random
import re

import pytest

from gemma_jax import demo, tasks
from gemma_jax.tasks.base import Episode, Fact, Piece, Question, Task

FILLER = (" the people of this long day", " and then she said some words", " with many little ones")


@dataclasses.dataclass(frozen=True)
class Numbers(Task):
    """Numbered facts: `number 3 is 41.`; asked for one of them."""

    name: str = "numbers"
    chance: float = 0.01

    def episode(self, seed, depths, questions_per_depth=1):
        rng = random.Random(seed)
        places = [depth for depth in sorted(depths) for _ in range(questions_per_depth)]
        values = rng.sample(range(10, 100), len(places))
        facts = [
            Fact(f" number {i} is {value}.", depth)
            for i, (depth, value) in enumerate(zip(places, values, strict=True))
        ]
        questions = [
            Question(f" what is number {i}? number {i} is", (str(value),), (i,), depth)
            for i, (depth, value) in enumerate(zip(places, values, strict=True))
        ]
        return Episode(self.name, seed, "these are numbers.", tuple(facts), tuple(questions))

    def filler(self, episode, books):
        rng = random.Random(episode.seed)
        for index in itertools.count():
            yield Piece(rng.choice(FILLER), fresh=index < 40)

    def score(self, question, answer):
        found = re.search(r"\d+", answer)
        return float(found is not None and found[0] == question.answers[0])


@pytest.fixture(autouse=True)
def numbers(monkeypatch):
    """The task `numbers` beside the real ones."""
    known, make = tasks.names(), tasks.make
    monkeypatch.setattr(tasks, "names", lambda: (*known, "numbers"))
    monkeypatch.setattr(
        tasks,
        "make",
        lambda name, **options: Numbers() if name == "numbers" else make(name, **options),
    )


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """The random model as Hugging Face and as we have it."""
    from gemma_jax.checkpoint.convert import convert

    directory = tmp_path_factory.mktemp("evaluate")
    source = demo.write_hugging_face(directory / demo.NAME)
    convert(source, directory / "model", dtype="float32")
    return source, directory / "model"


@pytest.fixture(scope="session")
def checkpoint(sources):
    return sources[1]
