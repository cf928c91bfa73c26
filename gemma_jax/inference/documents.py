"""What is read before the answer: files and a prompt, as one stream of text that is never held
whole.
"""

import codecs
import io
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from gemma_jax.errors import InputError, UsageError

ENCODING_ERRORS = ("strict", "replace")
READ_BYTES = 65_536
_BYTE_ORDER_MARK = "\N{ZERO WIDTH NO-BREAK SPACE}"
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Documents:
    """An iterable of text pieces: the files, then the prompt, joined by newlines and decoded from
    UTF-8.

    It can be iterated once, by one thread; others may look at its counters meanwhile.

    Attributes:
        total_bytes: size of everything; None when it is not known beforehand (a pipe).
        bytes_read: what has been read so far.
        replaced: how many characters U+FFFD stand where bytes were not UTF-8 (only with
            `errors="replace"`).
    """

    def __init__(
        self, files: Sequence[str] = (), prompt: str | None = None, *, errors: str = "strict"
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

    def __iter__(self) -> Iterator[str]:
        for index, (name, stream, _) in enumerate(self._sources):
            if index:
                yield "\n"
            with stream:
                yield from self._decode(name, stream)

    def _decode(self, name: str, stream: BinaryIO) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")(self._errors)
        offset = 0  # of the next byte that the decoder is given
        while True:
            try:
                data = stream.read(READ_BYTES)
            except OSError as error:
                raise InputError(f"{name} cannot be read ({error.strerror}).") from error
            held = decoder.getstate()[0]  # the first bytes of a character that is not complete yet
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{name} is not UTF-8 at byte {offset - len(held) + error.start}: convert it"
                    " to UTF-8, or read it with --encoding-errors replace."
                ) from error
            if not data and not offset:
                raise InputError(f"{name} is empty: give it some text.")
            # A text may hold U+FFFD of its own; those were not replaced.
            self.replaced += text.count(_REPLACEMENT) - (held + data).count(_REPLACEMENT.encode())
            yield text if offset else text.removeprefix(_BYTE_ORDER_MARK)
            if not data:
                return
            offset += len(data)
            self.bytes_read += len(data)


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
