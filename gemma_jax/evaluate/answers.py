"""What a model answers, whichever it is."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from gemma_jax.inference.streaming import StreamDecoder


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model wrote.

    Attributes:
        text: without the token that stopped it.
        tokens: with it.
        finite: whether all numbers behind it were.
    """

    text: str
    tokens: int
    finite: bool


def to_text(tokenizer: Any, ids: Sequence[int], stops: Sequence[int]) -> str:
    """The text of an answer's ids."""
    decoder = StreamDecoder(tokenizer)
    return "".join([*(decoder.push(i) for i in ids if i not in stops), decoder.finish()])
