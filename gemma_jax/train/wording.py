"""Wordings that nobody wrote: a fact with words in it that belong to others.

A few dozen sentence forms are soon known by heart. What is asked then has to be found by what stands in
the fact and in its question alike, and in any sentence: keys, what they are keys of, and values.
"""

import dataclasses
import functools
import random
import re
import string

from gemma_jax.tasks.base import Episode
from gemma_jax.tasks.forms import NEEDLES, PASSKEY

TASKS = ("passkey", "niah_")  # beginnings of the names of those whose other words do not matter
REPLACED, LEFT_OUT, ADDED = 0.25, 0.1, 0.1  # shares of the words that do not matter
_WORD = re.compile(r"\s*\S+")


def loosely(episode: Episode, rng: random.Random) -> Episode:
    """The episode with other words among those that do not matter; as it is, where all do."""
    if not episode.task.startswith(TASKS):
        return episode
    words_of = [set(_plain_words(fact.text)) for fact in episode.facts]
    asked = [set(_plain_words(question.text)) for question in episode.questions]
    kept: list[set[str]] = [set() for _ in episode.facts]
    for question, words in zip(episode.questions, asked, strict=True):
        for fact in question.facts:
            kept[fact] |= words
    return dataclasses.replace(
        episode,
        facts=tuple(
            dataclasses.replace(fact, text=_reworded(fact.text, words, rng))
            for fact, words in zip(episode.facts, kept, strict=True)
        ),
        questions=tuple(
            dataclasses.replace(
                question,
                text=_reworded(
                    question.text, set().union(*(words_of[i] for i in question.facts)), rng
                ),
            )
            for question in episode.questions
        ),
    )


def _reworded(text: str, kept: set[str], rng: random.Random) -> str:
    made = []
    for piece in _WORD.findall(text):
        word = piece.strip()
        if _plain(word) in kept or not word.strip(string.punctuation).isalpha():
            made.append(piece)
            continue
        chance = rng.random()
        if chance < REPLACED:
            made.append(piece.replace(word, rng.choice(_other_words())))
        elif chance > REPLACED + LEFT_OUT or not made:  # the first begins with the separator
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


def _plain_words(text: str) -> list[str]:
    return [_plain(word) for word in text.split()]


def _plain(word: str) -> str:
    return word.strip(string.punctuation).lower()
