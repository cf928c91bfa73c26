"""How answers are judged: the first candidates count, so that listing guesses scores nothing.

A candidate is what could be an answer of the task: a number, a UUID, one of the possible words.
Everything else in the answer is passed over.
"""

import re
from collections.abc import Iterable, Sequence

NUMBER = r"(?<!\d)(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
UUID = r"\b[0-9a-f]{2,}(?:-[0-9a-f]{2,})+\b"


def share_found(
    answer: str, references: Sequence[str], pattern: str, *, match_case: bool = False
) -> float:
    """The share of the references among as many different first candidates as there are references.

    Args:
        answer: what the model wrote.
        references: all that is wanted.
        pattern: a regular expression that matches a candidate.
        match_case: whether `pattern` tells capitals from small letters.
    """
    flags = 0 if match_case else re.IGNORECASE
    candidates: dict[str, None] = {}
    for found in re.finditer(pattern, answer, flags):
        candidates.setdefault(normal(found[0]))
        if len(candidates) == len(references):
            break
    return sum(normal(reference) in candidates for reference in references) / len(references)


def normal(text: str) -> str:
    """Small letters, single spaces, and digits without commas between them."""
    return re.sub(r"(?<=\d),(?=\d)", "", " ".join(text.lower().split()))


def one_of(words: Iterable[str]) -> str:
    """A pattern of the possible answers, whole words only; the longest goes first.

    The second part of a word with a hyphen is none: `wine-cellar` is no `cellar`.
    """
    alternatives = "|".join(re.escape(word) for word in sorted(words, key=lambda w: (-len(w), w)))
    return rf"(?<!\w)(?<!\w-)(?:{alternatives})(?!\w)"
