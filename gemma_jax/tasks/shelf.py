"""Books that are kept in memory: each is cut and tokenised once, for all the texts that show it.

A book is divided into sheets. A way through it begins anywhere, and soon meets the pieces of a sheet;
from there on it shows what the sheet has. What it shows is exactly what `cutting.pieces` gives when it
is fed the book from that place on, a block at a time.

Of a book's bytes, about 2.5 times as many are kept (1 for itself, 4 for each token, 16 for each piece).
"""

import codecs
import dataclasses
import functools
import lzma
import os
import re
import stat
from collections.abc import Iterator

import numpy as np

from gemma_jax.tasks import cutting
from gemma_jax.tasks.base import Piece, Run, Sheet

KEPT_BYTES = 150_000_000  # of all books together; what goes beyond is read anew each time
BLOCK_BYTES = 65_536  # that are read at once
SHEET_BYTES = 16_384
AHEAD_BYTES = 8_192  # more than it takes to know the longest piece and where the next begins

_BOM = b"\xef\xbb\xbf"
_EMPTY_LINE = re.compile(rb"\n\s*\n")
_SENTENCE_END = re.compile(rb"""[.!?]["')\]]*(?=\s)""")
# Where a piece ends is then not known from what is near it. Looked for first in every 40th character.
_ODD = re.compile(rf"\s{{{cutting.LONGEST}}}|[{cutting.CLOSING}]{{{cutting.LONGEST}}}")
_ODD_STEP, _ODD_SAMPLE = 40, re.compile(rf"\s{{9}}|[{cutting.CLOSING}]{{9}}")

_books: dict[tuple[str, int, int], "Book | None"] = {}


def kept(path: str) -> "Book | None":
    """The book of that path, if it is one that can be kept and there is room for it."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    key = path, found.st_mtime_ns, found.st_size
    if key not in _books:
        room = KEPT_BYTES - sum(len(book.raw) for book in _books.values() if book)
        _books[key] = _load(path, room) if stat.S_ISREG(found.st_mode) else None
    return _books[key]


def _load(path: str, most: int) -> "Book | None":
    try:
        raw = _read(path, most)
        if raw is None or raw.count(b"\r") != raw.count(b"\r\n"):
            return None
        text = raw.decode()
    except (OSError, ValueError, EOFError, lzma.LZMAError):
        return None  # whoever reads it anew tells what is wrong
    odd = _ODD_SAMPLE.search(text[::_ODD_STEP]) and _ODD.search(text)
    return None if odd else Book(raw)


def _read(path: str, most: int) -> bytes | None:
    """A file, decompressed, unless it has more than `most` bytes."""
    blocks, size = [], 0
    with lzma.open(path) if path.endswith(".xz") else open(path, "rb") as file:
        while block := file.read(16 * BLOCK_BYTES):
            blocks.append(block)
            size += len(block)
            if size > most:
                return None
    return b"".join(blocks)


class Leaf(Sheet):
    """Pieces of a part of a book.

    Attributes:
        bounds: where pieces begin in the book's bytes, and where the last one ends [pieces + 1].
        seen: the bytes of the book that show that there is a piece: all up to its first character that
            is no white space [pieces + 1].
    """

    def __init__(self, data: bytes, bounds: np.ndarray, seen: np.ndarray):
        super().__init__()
        self._data, self.bounds, self.seen = data, bounds, seen

    def texts(self) -> list[str]:
        ends = self.bounds.tolist()
        return [
            cutting.separated(self._data[start:end].decode())
            for start, end in zip(ends, ends[1:], strict=False)
        ]

    def uncertain(self, view: int) -> int | None:
        """The last piece that begins before `view`, if it may be cut otherwise by who sees no more: one
        that is longer than pieces should be, and whose end cannot be seen."""
        held = int(np.searchsorted(self.seen, view, side="right")) - 1
        return held if view - self.seen[held] >= cutting.LONGEST else None


@dataclasses.dataclass(frozen=True)
class Book:
    """A text in memory.

    Attributes:
        raw: as it is in the file.
    """

    raw: bytes

    @functools.cached_property
    def _gone(self) -> np.ndarray:
        """Offsets in the file of what is no part of the text: byte order mark, carriage returns."""
        mark = len(_BOM) if self.raw.startswith(_BOM) else 0
        if b"\r" not in self.raw:
            return np.arange(mark)
        returns = np.flatnonzero(np.frombuffer(self.raw, np.uint8) == ord("\r"))
        return np.concatenate([np.arange(mark), returns])

    @functools.cached_property
    def _data(self) -> bytes:
        """The text's bytes, with plain line ends."""
        if not len(self._gone):
            return self.raw
        return self.raw.removeprefix(_BOM).replace(b"\r\n", b"\n")

    @functools.cached_property
    def _leaves(self) -> dict[int, Leaf]:
        return {}

    def runs(self, start: int, end: int | None, fresh: bool) -> Iterator[Piece | Run]:
        """What the text shows from one offset in the file to another.

        That is what `cutting.pieces` makes of blocks that begin at `start`: it sees the text up to
        `view`, where a block ends, cuts what it sees, and holds the last piece. Pieces of leaves are
        the same, but where a long one was cut since its end was out of view, and at the end of the
        part: there, and until a leaf has a piece that begins at the same place, the text is cut anew.
        """
        last = len(self.raw) if end is None else end
        views = (self._offset(view) for view in range(start + BLOCK_BYTES, last, BLOCK_BYTES))
        at, stop = self._offset(start), self._offset(last)
        view, safe = next(views, stop), stop - AHEAD_BYTES
        while True:
            if at < safe and (found := self._find(at)):
                leaf, first = found
                until = int(np.searchsorted(leaf.bounds, safe, side="right")) - 1
                while view < min(stop, leaf.seen[until]):
                    if (held := leaf.uncertain(view)) is not None and held >= first:
                        until = held
                        break
                    view = next(views, stop)
                if until > first:
                    yield Run(leaf, first, until, fresh)
                    at = int(leaf.bounds[until])
                    continue
            spans = cutting.spans(_decode(self._data[at:view]).rstrip())
            piece = next(spans, None)
            for following in spans:
                yield Piece(cutting.separated(piece), fresh)
                at, piece = at + len(piece.encode()), following
                if at < safe and self._find(at):
                    break
            else:
                if view == stop:
                    if piece is not None:
                        yield Piece(cutting.separated(piece), fresh)
                    return
                view = next(views, stop)

    def _offset(self, offset: int) -> int:
        """Of the text's bytes, from one of the file's."""
        return offset - int(np.searchsorted(self._gone, offset)) if len(self._gone) else offset

    def _find(self, at: int) -> tuple[Leaf, int] | None:
        """The leaf that has a piece which begins there, and the number of that piece."""
        index = at // SHEET_BYTES
        leaf = self._leaf(index)
        if at < leaf.bounds[0]:
            leaf = self._leaf(index - 1)
        number = int(np.searchsorted(leaf.bounds, at))
        there = number < len(leaf.bounds) - 1 and leaf.bounds[number] == at
        return (leaf, number) if there else None

    def _leaf(self, index: int) -> Leaf:
        if index not in self._leaves:
            self._leaves[index] = self._cut(self._begin(index), self._begin(index + 1))
        return self._leaves[index]

    def _begin(self, index: int) -> int:
        """Where a leaf begins: where every way through the book comes past, if there is such a place."""
        low = index * SHEET_BYTES
        if low == 0 or low >= len(self._data):
            return min(low, len(self._data))
        sheet = self._data[low : low + SHEET_BYTES]
        for found in _EMPTY_LINE.finditer(sheet):
            if before := len(sheet[: found.start()].rstrip()):
                return low + before
        if found := _SENTENCE_END.search(sheet):
            return low + found.end()
        while self._data[low] & 0xC0 == 0x80:  # within a character
            low += 1
        return low

    def _cut(self, begin: int, stop: int) -> Leaf:
        """The pieces that begin between two places."""
        text = _decode(self._data[begin : stop + AHEAD_BYTES])
        size = len if text.isascii() else lambda some: len(some.encode())
        bounds, seen, at = [begin], [], begin
        for piece in cutting.spans(text.rstrip()):
            blank = len(piece) - len(piece.lstrip())
            seen.append(at + size(piece[: blank + 1]))
            if at >= stop:
                break
            at += size(piece)
            bounds.append(at)
        else:
            seen.append(len(self._data) + 1)  # nothing follows
        return Leaf(self._data, np.array(bounds, np.int32), np.array(seen, np.int32))


def _decode(data: bytes) -> str:
    """Text, without a last character that is not whole."""
    return codecs.utf_8_decode(data, "strict", False)[0]
