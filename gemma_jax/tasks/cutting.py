"""Text cut into pieces of about a sentence.

Where a piece ends depends on nothing that stands before it: two ways through a text that meet once go
on together.
"""

import re
from collections.abc import Iterable, Iterator

SHORTEST, LONGEST = 40, 400  # characters of a piece, where the text leaves a choice
CLOSING = "\"'’”)\\]"  # what may stand behind the end of a sentence, inside of a regular expression

_EMPTY_LINE = re.compile(r"\n\s*\n")
# A sentence; failing that, what is left of its paragraph; else up to a space; else a bare cut.
_PIECE = re.compile(
    rf"""\s*\S(?:
        .{{{SHORTEST - 1},{LONGEST - 1}}}?[.!?][{CLOSING}]*(?=\s)
        | .{{0,{LONGEST - 1}}}\Z
        | .{{0,{LONGEST - 1}}}(?=\s)
        | .{{0,{LONGEST - 1}}}
    )""",
    re.VERBOSE | re.DOTALL,
)


def pieces(blocks: Iterable[str]) -> Iterator[str]:
    """Cuts a text; the last piece of what was read is held until it is known where it ends."""
    held = ""
    for block in blocks:
        *found, held = cut(held + block)
        yield from found
    if held := held.rstrip():
        yield held


def cut(text: str) -> list[str]:
    """Pieces that join to the text, but for white space beyond any reason; the last may go on."""
    body = text.rstrip()
    found = [_trim(piece) for piece in spans(body)]
    blank = text[len(body) :][:LONGEST]
    return [*found[:-1], "".join([*found[-1:], blank])]


def spans(body: str) -> Iterator[str]:
    """Pieces that join to the text, which ends without white space."""
    start = 0
    for end in _paragraph_ends(body):
        yield from _PIECE.findall(body, start, end)
        start = end


def _paragraph_ends(body: str) -> Iterator[int]:
    for found in _EMPTY_LINE.finditer(body):
        end = found.start()
        while end and body[end - 1].isspace():
            end -= 1
        if end:
            yield end
    yield len(body)


def separated(piece: str) -> str:
    """The piece behind white space, its own or that of a paragraph."""
    return piece if piece[0].isspace() else f"\n\n{piece}"


def _trim(piece: str) -> str:
    blank = len(piece) - len(piece.lstrip())
    return piece[max(0, blank - LONGEST) :]
