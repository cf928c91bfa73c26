"""Wordings that nobody wrote: facts and questions with words in them that belong to others.

A few dozen sentence forms are soon known by heart. What is asked then has to be found by keys and values
alone, in whatever sentence they stand.
"""

import dataclasses
import functools
import random
import re
import string

from gemma_jax.tasks.base import Episode
from gemma_jax.tasks.forms import NEEDLES, PASSKEY

# Beginnings of the names of tasks in which words beside key and value do not matter.
TASKS = ("passkey", "niah_")
REPLACED, LEFT_OUT, ADDED = 0.25, 0.1, 0.1  # shares of these words
_WORD = re.compile(r"\s*\S+")


def loosely(episode: Episode, rng: random.Random) -> Episode:
    """The episode with other words among those that do not matter; as it is, where all do.

    Needles' keys have a hyphen and stay, whether they are asked for or not. Of passkeys those words stay
    that facts and questions have in common: whose they are, and what they are called.
    """
    if not episode.task.startswith(TASKS):
        return episode
    kept: set[str] = set()
    if episode.task == "passkey":
        told, asked = (
            {_plain(word) for part in parts for word in part.text.split()}
            for parts in (episode.facts, episode.questions)
        )
        kept = told & asked

    def reworded(parts):
        return tuple(
            dataclasses.replace(part, text=_reworded(part.text, kept, rng)) for part in parts
        )

    return dataclasses.replace(
        episode, facts=reworded(episode.facts), questions=reworded(episode.questions)
    )


def _reworded(text: str, kept: set[str], rng: random.Random) -> str:
    """Punctuation stays, and the white space that the text begins with."""
    made = []
    for piece in _WORD.findall(text):
        word = piece.strip()
        bare = word.strip(string.punctuation)
        if not bare.isalpha() or _plain(word) in kept:
            made.append(piece)
            continue
        chance = rng.random()
        if chance < REPLACED:
            made.append(piece.replace(bare, rng.choice(_other_words())))
        elif chance > REPLACED + LEFT_OUT or bare != word or not made:
            made.append(piece)
        if chance > 1.0 - ADDED:
            made.append(f" {rng.choice(_other_words())}")
    return "".join(made)


@functools.cache
def _other_words() -> tuple[str, ...]:
    """All words of the forms to train on, in order."""
    forms = [PASSKEY["train"], NEEDLES["train"]]
    texts = [text for form in forms for text in (*form.facts, *form.questions)]
    return tuple(sorted({word for text in texts for word in text.split() if word.isalpha()}))


def _plain(word: str) -> str:
    return word.strip(string.punctuation).lower()
