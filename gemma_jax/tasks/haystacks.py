"""What facts are hidden in: the sentences of books, or a few sentences that repeat without end.

Books are read as a stream, a block at a time, from a place that the seed decides, and begin again
only when all of them were shown. A file whose name ends in `.xz` is decompressed on the way. Books for
which there is room are kept in memory, cut and tokenised.
"""

import codecs
import io
import itertools
import lzma
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from gemma_jax.errors import InputError, UsageError
from gemma_jax.tasks import cutting, shelf
from gemma_jax.tasks.base import Piece, Run, Sheet

SPLITS = ("train", "held_out")
GRASS = (
    " The meadow is green.",
    " The sky is clear and blue.",
    " The sun is bright and warm.",
    " Off we walk.",
    " Out and home again.",
)

_BOOKS = Path(__file__).parent / "books"
_START = re.compile(rb"""\n(?=\s*\n)|[.!?]["')\]]*(?=\s)""")


def stream(kind: str, books: Iterable[str], seed: str) -> Iterator[Piece | Run]:
    """The haystack of that name: `grass` or `books`."""
    return grass() if kind == "grass" else runs(books, seed)


def shipped(split: str) -> tuple[str, ...]:
    """Paths of the books that come with the package: those to train on, or those held out.

    Raises:
        UsageError: there is no such split.
    """
    if split not in SPLITS:
        raise UsageError(f"There are no books called {split!r}: choose {' or '.join(SPLITS)}.")
    return tuple(str(path) for path in sorted((_BOOKS / split).glob("*.txt.xz")))


def check(books: Iterable[str]) -> None:
    """Reads all of the books once, so that a bad one is known before a model reads the others.

    Raises:
        InputError: a file is missing, unreadable, without text or not UTF-8, or there is none.
    """
    for book in _listed(books):
        blocks = _text(book, 0, None)
        if not any([bool(block.strip()) for block in blocks]):
            raise InputError(f"{book} has no text: name a file that has some.")


def sentences(books: Iterable[str], seed: str) -> Iterator[Piece]:
    """Pieces of about a sentence, without end, in an order of the books that the seed decides.

    Raises:
        InputError: as `check` does, when a bad file or a bad place in it is reached.
    """
    for item in runs(books, seed):
        if isinstance(item, Run):
            yield from (Piece(t, item.fresh) for t in item.sheet.texts()[item.first : item.last])
        else:
            yield item


def runs(books: Iterable[str], seed: str) -> Iterator[Piece | Run]:
    """The same pieces as `sentences`, many at a time where a book is kept in memory."""
    rng = random.Random(seed)
    order = _listed(books)
    rng.shuffle(order)
    start = _start(order[0], rng)
    parts = [
        (order[0], start, None),
        *((book, 0, None) for book in order[1:]),
        (order[0], 0, start),
    ]
    for fresh in itertools.chain([True], itertools.repeat(False)):
        shown = False
        for part in parts:
            for item in _part(*part, fresh):
                shown = True
                yield item
        if not shown:
            raise InputError(f"{', '.join(order)} has no text: name a file that has some.")


def grass() -> Iterator[Run]:
    """The few sentences of the classic haystack, without end."""
    once = len(GRASS)
    yield Run(_MEADOW, 0, once)
    while True:
        yield Run(_MEADOW, once, once * _ROUNDS, fresh=False)


class _Meadow(Sheet):
    def texts(self) -> tuple[str, ...]:
        return GRASS * _ROUNDS


_ROUNDS = 100  # of grass, that are shown together
_MEADOW = _Meadow()


def _part(book: str, start: int, end: int | None, fresh: bool) -> Iterator[Piece | Run]:
    if kept := shelf.kept(book):
        yield from kept.runs(start, end, fresh)
    else:
        for text in cutting.pieces(_text(book, start, end)):
            yield Piece(cutting.separated(text), fresh)


def _listed(books: Iterable[str]) -> list[str]:
    listed = [str(book) for book in books]
    if not listed:
        raise InputError("The haystack has no books: name at least one text file.")
    return listed


def _open(book: str) -> BinaryIO:
    if kept := shelf.kept(book):
        return io.BytesIO(kept.raw)
    return lzma.open(book) if book.endswith(".xz") else open(book, "rb")


def _start(book: str, rng: random.Random) -> int:
    """An offset in bytes that stands behind a sentence, drawn from all of the book."""
    try:
        with _open(book) as file:
            offset = file.seek(rng.randrange(max(1, file.seek(0, io.SEEK_END))))
            block = file.read(shelf.BLOCK_BYTES)
    except (OSError, ValueError, EOFError, lzma.LZMAError) as error:
        raise _unreadable(book, error) from error
    found = _START.search(block) or re.search(rb"(?=\s)", block)
    return offset + found.end() if found else 0


def _text(book: str, start: int, end: int | None) -> Iterator[str]:
    """The book's text from one offset to another, in blocks."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), translate=True)
    offset = start
    try:
        with _open(book) as file:
            file.seek(start)
            while offset != end:
                data = file.read(
                    shelf.BLOCK_BYTES if end is None else min(shelf.BLOCK_BYTES, end - offset)
                )
                text = decoder.decode(data, final=not data)
                yield text if offset else text.removeprefix("\N{ZERO WIDTH NO-BREAK SPACE}")
                if not data:
                    return
                offset += len(data)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{book} is not UTF-8 in its {shelf.BLOCK_BYTES:,} bytes from {offset:,}: convert it to UTF-8."
        ) from error
    except (OSError, ValueError, EOFError, lzma.LZMAError) as error:
        raise _unreadable(book, error) from error


def _unreadable(book: str, error: Exception) -> InputError:
    reason = getattr(error, "strerror", None) or str(error)
    return InputError(f"{book} cannot be read ({reason}): name a text file.")
