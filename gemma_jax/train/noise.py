"""Text that is like no text, to learn that nothing of it is to be remembered for being strange."""

import dataclasses
import functools
import random
import string

import numpy as np

from gemma_jax.text import BatchEncoder
from gemma_jax.train.corpus import Text, haystack
from gemma_jax.train.tokenizer import NUMBERS

SEEDS = 2**31  # of lists
NOISE_BLOCK = 64  # tokens
MOST_MARKS, LONGEST_MARK = 12, 6  # what is strewn over a text: pieces, and tokens of one
MOST_MARKED = 0.2  # share of its tokens
COUNTED = 4096  # numbers to choose from
LONGEST_LIST = 64  # items
LIST_TOKENS = 256  # of text, for each list in it
FORMATS = (
    "{}",
    "{:02d}",
    "{:03d}",
    "{:x}",
    "{:02x}",
    "{:04X}",
    "{:b}",
    "{:,}",
    "0x{:x}",
    "{}.",
    "[{}]",
)
SEPARATORS = (" ", ", ", ",", "  ", "\n", "\t", ":", "-", ".", " | ", ";")


@dataclasses.dataclass(frozen=True)
class Noise:
    """Makes what no text looks like, to learn that nothing of it is to be remembered for being strange.

    Texts that are read later have signs, names and layouts that those of the training never show.

    Attributes:
        share: of the stretches of text that are made strange.
        encode: the tokenizer's.
        others: texts of another kind; some of the stretches are cut out of them instead.
    """

    share: float
    encode: BatchEncoder
    others: tuple[Text, ...] = ()

    @functools.cached_property
    def _numbers(self) -> np.ndarray:
        return np.unique(np.concatenate(self.encode(NUMBERS)))

    @functools.cached_property
    def _numerals(self) -> list[np.ndarray]:
        """Numbers of one to eight digits, as texts have them."""
        values = 10 ** np.random.default_rng(0).uniform(0, 8, COUNTED)
        return [np.array(ids) for ids in self.encode([f" {int(value)}" for value in values])]

    @functools.cached_property
    def _signs(self) -> np.ndarray:
        return np.unique(np.concatenate(self.encode([*string.punctuation, "\n"])))

    def make(self, rng: np.random.Generator, ids: np.ndarray) -> np.ndarray:
        """Of a stretch of text: with strange marks all over it, blocks of other tokens, lists; or another."""
        kinds = [self._marked, self._mixed, self._listed, *([self._other] if self.others else [])]
        return kinds[rng.integers(len(kinds))](rng, ids).astype(np.int32)

    def _other(self, rng: np.random.Generator, ids: np.ndarray) -> np.ndarray:
        return haystack(self.others).cut(rng, len(ids))[0]

    def _marked(self, rng: np.random.Generator, ids: np.ndarray) -> np.ndarray:
        """With a few short pieces again and again, of any tokens or of signs, and with numbers."""
        made = ids.copy()
        lengths = rng.integers(1, LONGEST_MARK + 1, size=rng.integers(1, MOST_MARKS + 1))
        kinds = (self.encode.text_ids, self._signs)
        marks = [rng.choice(kinds[rng.integers(len(kinds))], length) for length in lengths]
        share_of_numbers = rng.uniform()
        covered = rng.uniform(0, MOST_MARKED) * len(ids)
        for at in rng.integers(len(ids), size=int(covered / lengths.mean())):
            strewn = self._numerals if rng.uniform() < share_of_numbers else marks
            mark = strewn[rng.integers(len(strewn))][: len(ids) - at]
            made[at : at + len(mark)] = mark
        return made

    def _mixed(self, rng: np.random.Generator, ids: np.ndarray) -> np.ndarray:
        """Blocks are as they were, in another order, of any tokens, or full of numbers."""
        of_any = rng.choice(self.encode.text_ids, len(ids))
        counted = np.where(
            rng.uniform(size=len(ids)) < 0.5, rng.choice(self._numbers, len(ids)), ids
        )
        kinds = rng.integers(4, size=-(-len(ids) // NOISE_BLOCK))
        kinds = np.repeat(kinds, NOISE_BLOCK)[: len(ids)]
        return np.choose(kinds, [ids, rng.permutation(ids), of_any, counted])

    def _listed(self, rng: np.random.Generator, ids: np.ndarray) -> np.ndarray:
        """With lists in it, as programs print them: of numbers that count on or do not, some with names."""
        made = ids.copy()
        for at in rng.integers(len(ids), size=-(-len(ids) // LIST_TOKENS)):
            text = print_list(random.Random(int(rng.integers(SEEDS))))
            listed = self.encode([text])[0][: len(ids) - at]
            made[at : at + len(listed)] = listed
        return made


def print_list(rng: random.Random) -> str:
    """E.g. `07 08 09 0a ` or `kb [2166], Ro [18], `."""
    count = rng.randint(4, LONGEST_LIST)
    form, separator = rng.choice(FORMATS), rng.choice(SEPARATORS)
    first, step = int(10 ** rng.uniform(0, 7)), rng.choice((1, 1, 1, -1, 2, 10))
    most = int(10 ** rng.uniform(1, 7))
    counts, named = rng.random() < 0.5, rng.random() < 0.3
    numbers = [max(first + step * i, 0) if counts else rng.randint(0, most) for i in range(count)]
    items = map(form.format, numbers)
    if named:
        items = (f"{_name(rng)} {item}" for item in items)
    return separator.join(items) + separator


def _name(rng: random.Random) -> str:
    letters = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(1, 9)))
    return rng.choice((letters, letters.capitalize(), letters.upper()))
