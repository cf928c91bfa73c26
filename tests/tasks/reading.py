"""How tests read what tasks make: a tokenizer of words, texts put together, and facts found by form."""

import re
from collections.abc import Sequence

from gemma_jax.tasks import haystacks
from gemma_jax.tasks.base import Composition, Episode, Task


class Words:
    """A token is a word with the white space before it."""

    def __init__(self):
        self._ids: dict[str, int] = {}
        self._words: list[str] = []

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[self._identify(word) for word in re.findall(r"\s*\S+", text)] for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self._words[index] for index in ids)

    def _identify(self, word: str) -> int:
        if word not in self._ids:
            self._ids[word] = len(self._words)
            self._words.append(word)
        return self._ids[word]


def compose(task: Task, episode: Episode, tokens: int, books: Sequence[str] = ()) -> str:
    """The whole text of an episode; `books` are the held-out ones by default."""
    words = Words()
    filler = task.filler(episode, books or haystacks.shipped("held_out"))
    text = Composition(episode, filler, tokens, words.encode)
    return "".join(words.decode(ids) for ids in text)


def window(text: str, share: float = 0.3) -> str:
    """The end of a text, which is all that a reader without memory sees."""
    return text[-int(len(text) * share) :]


def found(text: str, forms: Sequence[str], wanted: str, **known: str) -> list[str]:
    """What stands at the place `{wanted}` wherever the text has a sentence of one of the forms."""
    values = []
    for form in forms:
        pattern = re.escape(form)
        for name, value in known.items():
            pattern = pattern.replace(re.escape("{" + name + "}"), value)
        first, *others = pattern.split(re.escape("{" + wanted + "}"))
        pattern = rf"{first}(?P<it>[\w-]+)" + "(?P=it)".join(others)
        values += [match["it"] for match in re.finditer(pattern, text)]
    return values
