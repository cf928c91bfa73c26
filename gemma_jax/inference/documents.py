"""What is read before the answer: files and a prompt, as one stream of text that is never held
whole.
"""

import codecs
import collections
import dataclasses
import hashlib
import io
import lzma
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from gemma_jax.checkpoint.memory_file import Position, Source
from gemma_jax.errors import InputError, UsageError

ENCODING_ERRORS = ("strict", "replace")
READ_BYTES = 65_536
READ_CHARS = 65_536  # of a compressed file
_BYTE_ORDER_MARK = "\N{ZERO WIDTH NO-BREAK SPACE}"
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def read_text(file: str) -> Iterator[str]:
    """The text of one file in pieces; one whose name ends in `.xz` is decompressed.

    Raises:
        InputError: it cannot be read, is empty, or is not UTF-8.
    """
    if not file.endswith(".xz"):
        yield from Documents([file])
        return
    try:
        with lzma.open(file, "rt", encoding="utf-8-sig", newline="") as text:
            while piece := text.read(READ_CHARS):
                yield piece
    except (OSError, ValueError, EOFError, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{file} cannot be read ({reason}): name a text file.") from error


@dataclasses.dataclass(frozen=True)
class _Mark:
    """Where a piece of text begins."""

    character: int  # of the whole text
    source: int
    byte: int
    digest: Any  # SHA-256 of the source's bytes before
    text: str


class Documents:
    """An iterable of text pieces: the files, then the prompt, joined by newlines and decoded from
    UTF-8.

    It can be iterated once, by one thread; others may look at its counters meanwhile, and ask for
    positions.

    Attributes:
        total_bytes: size of everything that is to be read; None when it is not known beforehand (a
            pipe).
        bytes_read: what has been read so far.
        replaced: how many characters U+FFFD stand where bytes were not UTF-8 (only with
            `errors="replace"`).
    """

    def __init__(
        self,
        files: Sequence[str] = (),
        prompt: str | None = None,
        *,
        errors: str = "strict",
    ):
        """Opens everything, so that what is missing is known before a model is loaded.

        Args:
            files: paths; "-" is standard input.
            prompt: the text that comes last; "-" reads it from standard input.
            errors: "strict" refuses bytes that are not UTF-8; "replace" reads them as U+FFFD and
                counts them.

        Raises:
            InputError: a file is missing, unreadable or empty, or the prompt is empty.
            UsageError: nothing to read, or standard input named twice.
        """
        if errors not in ENCODING_ERRORS:
            raise UsageError(f"encoding errors are {errors!r}: choose strict or replace.")
        if not files and prompt is None:
            raise UsageError(
                "There is nothing to read: give --prompt TEXT, --context FILE, or both."
            )
        if [*files, prompt].count("-") > 1:
            raise UsageError(
                "Standard input ('-') is named more than once: it can be read only once."
            )
        self._errors = errors
        self._sources = [_open_file(file) for file in files]
        if prompt is not None:
            self._sources.append(_open_prompt(prompt))
        sizes = [size for _, _, size in self._sources]
        self.total_bytes = None if None in sizes else sum(sizes)
        self.bytes_read = 0
        self.replaced = 0
        self._read: list[Source] = []  # whole sources
        self._start: Position | None = None
        self._characters = 0  # given so far
        self._marks: collections.deque[_Mark] | None = None

    def go_on(self, position: Position) -> None:
        """Starts where a reading of the same sources had come to. That they begin as they did is
        checked when they are iterated.

        Raises:
            InputError: there were more sources then.
        """
        if len(position.sources) > len(self._sources):
            raise InputError(
                f"{len(position.sources)} files or prompts had been begun, and {len(self._sources)}"
                " are given: name the same again."
            )
        self._start, self._characters = position, -position.skip
        if self.total_bytes is not None:
            self.total_bytes -= sum(source.bytes for source in position.sources)

    def track(self) -> None:
        """Keeps what `position` needs, from the last character that was forgotten on."""
        self._marks = collections.deque()

    def forget(self, character: int) -> None:
        """Promises that no position before this character will be asked for."""
        while len(self._marks) > 1 and self._marks[1].character <= character:
            self._marks.popleft()

    def position(self, character: int) -> Position:
        """Where to `go_on` to start with this character of a text that is tracked; they may only be
        asked for in order.
        """
        self.forget(character)
        mark = self._marks[0]
        begun = Source(self._sources[mark.source][0], mark.byte, mark.digest.hexdigest())
        skip = character - mark.character
        return Position((*self._read[: mark.source], begun), skip, _sha256(mark.text[:skip]))

    def share_read(self) -> float | None:
        """Which share of everything has been read (0 to 1), if that is known."""
        return min(1.0, self.bytes_read / self.total_bytes) if self.total_bytes else None

    @property
    def sources(self) -> tuple[Source, ...]:
        """The sources that were read to their end."""
        return tuple(self._read)

    def __iter__(self) -> Iterator[str]:
        begun = self._start.sources if self._start else ()
        skipped = []  # text that was read before, after the last one's bytes
        for index, (name, stream, _) in enumerate(self._sources):
            with stream:
                digest, byte = hashlib.sha256(), 0
                if index < len(begun):
                    byte = self._skip(name, stream, digest, begun[index])
                if index < len(begun) - 1:
                    self._read.append(begun[index])
                    continue
                for text in self._decode(index, digest, byte):
                    missing = max(0, -self._characters)
                    self._characters += len(text)
                    if missing:
                        skipped.append(text[:missing])
                        if self._characters >= 0 and _sha256(*skipped) != self._start.sha256:
                            raise _changed(name, byte)
                    yield text[missing:]
        if self._characters < 0:
            raise _changed(name, byte)

    def _skip(self, name: str, stream: BinaryIO, digest: Any, read: Source) -> int:
        """Takes the bytes that were read before from a stream, and makes sure that they are those."""
        left = read.bytes
        while left and (data := self._bytes(name, stream, min(READ_BYTES, left))):
            digest.update(data)
            left -= len(data)
        if left or digest.hexdigest() != read.sha256:
            raise _changed(name, read.bytes)
        return read.bytes

    def _decode(self, index: int, digest: Any, offset: int) -> Iterator[str]:
        """The text of a source from a byte on, in pieces; a mark is left where each begins."""
        name, stream, _ = self._sources[index]
        decoder = codecs.getincrementaldecoder("utf-8")(self._errors)
        begins = offset == 0
        while True:
            data = self._bytes(name, stream, READ_BYTES)
            held = decoder.getstate()[0]  # the first bytes of a character that is not complete yet
            start = offset - len(held)
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{name} is not UTF-8 at byte {start + error.start}: convert it to UTF-8, or"
                    " read it with --encoding-errors replace."
                ) from error
            if not data and not offset:
                raise InputError(f"{name} is empty: give it some text.")
            offset += len(data)
            self.bytes_read += len(data)
            if data and not text:
                continue
            # A text may hold U+FFFD of its own; those were not replaced.
            self.replaced += text.count(_REPLACEMENT) - (held + data).count(_REPLACEMENT.encode())
            if begins:
                text = text.removeprefix(_BYTE_ORDER_MARK)
                text = "\n" + text if index else text
                begins = False
            if self._marks is not None:
                self._marks.append(_Mark(self._characters, index, start, digest.copy(), text))
            used = len(held) + len(data) - len(decoder.getstate()[0])
            digest.update((held + data)[:used])
            if not data:
                self._read.append(Source(name, offset, digest.hexdigest()))
            yield text
            if not data:
                return

    def _bytes(self, name: str, stream: BinaryIO, size: int) -> bytes:
        try:
            return stream.read(size)
        except OSError as error:
            raise InputError(f"{name} cannot be read ({error.strerror}).") from error


def _sha256(*texts: str) -> str:
    return hashlib.sha256("".join(texts).encode("utf-8", "surrogatepass")).hexdigest()


def _changed(name: str, count: int) -> InputError:
    return InputError(
        f"{name} does not begin with what was read before (the first {count} bytes, and some text"
        " after them): give the same files in the same order, or read them from the start without"
        " --resume."
    )


def _open_file(file: str) -> tuple[str, BinaryIO, int | None]:
    if file == "-":
        return "standard input", _standard_input(), None
    try:
        stream = open(file, "rb", buffering=0)
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode):
            return file, stream, None
        if status.st_size == 0 and not os.pread(
            stream.fileno(), 1, 0
        ):  # some files of the system have no size
            raise InputError(f"{file} is empty: give it some text.")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{file} cannot be read ({reason}): name a text file.") from error
    return file, stream, status.st_size or None


def _open_prompt(prompt: str) -> tuple[str, BinaryIO, int | None]:
    if prompt == "-":
        return "standard input", _standard_input(), None
    if not prompt:
        raise InputError("The prompt is empty: give --prompt some text.")
    try:
        # The command line may hold bytes that are not UTF-8; Python hands them over as surrogates.
        data = prompt.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise InputError(
            f"The prompt has code points that are not characters ({error})."
        ) from error
    return "the prompt", io.BytesIO(data), len(data)


def _standard_input() -> BinaryIO:
    try:
        # Unbuffered: a thread that waits in a buffered read holds a lock that the interpreter needs
        # at its end.
        return open(sys.stdin.fileno(), "rb", buffering=0, closefd=False)
    except (AttributeError, OSError, ValueError):
        if sys.stdin is None:
            raise InputError("Standard input is closed: name a file instead of '-'.") from None
        return sys.stdin.buffer  # replaced by an object without a file
