"""Token ids to text as they come: whole characters only, and nothing of a stop text."""

import re
from collections.abc import Sequence
from typing import Any

from gemma_jax.errors import UsageError
from gemma_jax.text import control_tokens

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MOST_BYTES = 4  # of a character, and so the most tokens that it can be cut into
_MOST_HELD = 64  # tokens, of which each begins what is no character


class StreamDecoder:
    """Turns ids into text as they come; what it gives is whole characters, never half of one.

    Bytes (`<0xE2>`) are held until they make a character; bytes that make none become one U+FFFD
    each. Control tokens give no text.
    """

    def __init__(self, tokenizer: Any):
        self._backend = tokenizer.backend_tokenizer
        self._control = set(control_tokens(tokenizer).values())
        self._bytes = b""
        self._context: list[
            int
        ] = []  # tokens already given: some decoders look at what comes before
        self._pending: list[int] = []  # tokens that end within a character (byte-level tokenizers)
        self._begin = 0  # the pending token in which that character begins

    def push(self, token: int) -> str:
        """The text that became certain with this token; often one word, sometimes empty."""
        if token in self._control:
            return self.finish()
        content = self._backend.id_to_token(token)
        if content is None:  # the model's vocabulary may be padded beyond the tokenizer's
            return self.finish()
        if match := _BYTE_TOKEN.fullmatch(content):
            self._bytes += bytes.fromhex(match[1])
            return self._pending_text() + self._complete_characters()
        return self._incomplete_characters() + self._plain(token)

    def finish(self) -> str:
        """The rest, at the end of the text."""
        return self._pending_text() + self._incomplete_characters()

    def _complete_characters(self) -> str:
        text = ""
        while self._bytes:
            try:
                text += self._bytes.decode()
                self._bytes = b""
            except UnicodeDecodeError as error:
                text += self._bytes[: error.start].decode()
                self._bytes = self._bytes[error.start :]
                if error.reason == "unexpected end of data":
                    break
                text += _REPLACEMENT * (error.end - error.start)
                self._bytes = self._bytes[error.end - error.start :]
        return text

    def _incomplete_characters(self) -> str:
        count, self._bytes = len(self._bytes), b""
        return _REPLACEMENT * count

    def _plain(self, token: int) -> str:
        before = self._context + self._pending
        self._pending.append(token)
        text = self._decode([*before, token])
        if text.endswith(_REPLACEMENT):
            if len(text) > len(self._decode(before)):
                self._begin = len(self._pending) - 1  # it may end one character and begin another
            waited = len(self._pending) - self._begin
            if waited < _MOST_BYTES and len(self._pending) < _MOST_HELD:
                return ""
        return self._pending_text()

    def _pending_text(self) -> str:
        if not self._pending:
            return ""
        text = self._decode(self._context + self._pending)[len(self._decode(self._context)) :]
        self._context, self._pending, self._begin = self._pending, [], 0
        return text

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._backend.decode(tokens, skip_special_tokens=False) if tokens else ""


class StopTexts:
    """Ends a stream of text before the first of some stop texts, even one that spans pieces."""

    def __init__(self, stops: Sequence[str] = ()):
        if any(not stop for stop in stops):
            raise UsageError("A stop text is empty: give --stop at least one character.")
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """The text that is certainly not part of a stop text; sets `found` when one is complete."""
        if self.found:
            return ""
        text = self._held + piece
        starts = [start for stop in self._stops if (start := text.find(stop)) >= 0]
        if starts:
            self.found, self._held = True, ""
            return text[: min(starts)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next(
        (n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0
    )
