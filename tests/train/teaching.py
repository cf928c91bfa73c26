"""What several tests of training use: a task that is learnt in seconds, and trees compared."""

import random

import jax
import numpy as np

from gemma_jax import tasks
from gemma_jax.tasks.base import Draft, Task


class Digits(Task):
    """A fact is a digit, written four times, among words; a question mark asks for it."""

    name = "digits"
    most_questions = None

    def episode(self, seed, depths, questions_per_depth=1):
        rng = random.Random(seed)
        draft = Draft(self.name, seed)
        value = rng.choice("23456789")
        draft.ask("?", [value], [draft.fact(4 * value, depths[-1])], depths[-1])
        return draft.episode()


def add_digits(monkeypatch):
    """Makes `digits` one of the tasks."""
    make = tasks.make
    monkeypatch.setattr(
        tasks, "make", lambda name, **kinds: Digits() if name == "digits" else make(name, **kinds)
    )


def equal_trees(one, other):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return jax.tree.structure(one) == jax.tree.structure(other) and all(
        np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs
    )
