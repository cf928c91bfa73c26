"""Tasks that ask what a model remembers: seeded generators of texts, questions and answers, and scorers."""

import importlib
from typing import Any

from gemma_jax.errors import UsageError

# Where a task is made, and what the maker is called; given the task's name and its options.
_HOMES = {
    "passkey": "passkey",
    **{f"niah_single_{number}": "needles" for number in (1, 2, 3)},
    **{f"niah_multikey_{number}": "needles" for number in (1, 2, 3)},
    "niah_multivalue": "needles",
    "niah_multiquery": "needles",
    "variable_tracking": "variables",
    "common_words": "frequencies",
    "frequent_words": "frequencies",
    "mqar": "recall",
    "copy": "copying",
    **{f"babilong_qa{number}": "babilong" for number in (1, 2, 3, 4, 5)},
}


def names() -> tuple[str, ...]:
    """All tasks, as the command line knows them."""
    return tuple(_HOMES)


def make(
    name: str, *, forms: str = "classic", keys: str = "held_out", haystack: str | None = None
) -> Any:
    """The task of that name, a `gemma_jax.tasks.base.Task`.

    Args:
        name: one of `names()`.
        forms: the wording of facts and questions: `classic`, `train` (to train on) or `held_out`.
            No wording is in two of them.
        keys: the names that facts go by: `train`, `invented` (for needles and passkeys: of words put
            together from those), `held_out` (no word of which is in the former, but for bAbI's own
            names), or `all`. Tests use `held_out`, so that a memory that was trained on
            `train` has not seen them.
        haystack: `grass`, `books` or `needles`, where the task can be hidden in it; None is what
            belongs to the task.

    Raises:
        UsageError: there is no such task, or it has no such option.
    """
    if name not in _HOMES:
        raise UsageError(f"There is no task called {name!r}: choose {', '.join(_HOMES)}.")
    from gemma_jax.tasks.forms import FORMS
    from gemma_jax.tasks.words import KEYS

    if forms not in FORMS:
        raise UsageError(f"There are no forms called {forms!r}: choose {', '.join(FORMS)}.")
    if keys not in KEYS:
        raise UsageError(f"There are no keys called {keys!r}: choose {', '.join(KEYS)}.")
    home = importlib.import_module(f"gemma_jax.tasks.{_HOMES[name]}")
    if haystack is not None and haystack not in home.HAYSTACKS:
        raise UsageError(
            f"{name} cannot be hidden in {haystack!r}: choose {', '.join(home.HAYSTACKS)}."
        )
    return home.make(name, forms=forms, keys=keys, haystack=haystack)
