"""Text into a Memory, and a Memory into what an answer begins with.

`remember` reads a text as far as its tokens are certain and fill whole pieces; `recall` reads what
is left, less than a piece (16,384 tokens on a GPU), and a question. Together they give the model
exactly the pieces that one reading of everything would give it, so that it makes no difference, not
in one bit, whether a text was read at once, kept in a memory file in between, or interrupted and
gone on with.
"""

import collections
import contextlib
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from gemma_jax import text as text_lib
from gemma_jax.checkpoint.memory_file import Memory
from gemma_jax.errors import InputError, UsageError
from gemma_jax.inference.pieces import PIECES_AHEAD, ahead, pieces_of
from gemma_jax.inference.prefill import piece_sizes
from gemma_jax.inference.progress import Meter
from gemma_jax.inference.reading import Reading, feed, read, require_whole, room_from
from gemma_jax.model.state import init_state
from gemma_jax.text import Place, Turn, UserText

JOINT = "\n"  # between two texts


class Keeper(Protocol):
    """Saves a reading that is under way; it is entered as a context while there is one."""

    interrupted: bool  # the reading is to be saved and left

    def __enter__(self) -> Any: ...
    def __exit__(self, *_: Any) -> None: ...
    def due(self) -> bool:
        """Whether it is time to save."""
        ...

    def keep(self, memory: Memory | None) -> None:
        """Saves it (None: nothing was read yet), and raises when the reading is to be left."""


def new_memory(model: Any) -> Memory:
    """Of nothing."""
    return Memory(init_state(model.config, batch_size=1), place=Place.START)


def fork(memory: Memory) -> Memory:
    """A memory with a State of its own: reading on consumes the State."""
    return dataclasses.replace(memory, state=jax.tree.map(jnp.copy, memory.state))


def remember(
    model: Any,
    text: str | Iterable[str],
    memory: Memory | None = None,
    *,
    template: bool = False,
    chunk_tokens: int | None = None,
    meter: Meter | None = None,
    keeper: Keeper | None = None,
) -> Memory:
    """Reads a text (pieces of one) into a memory.

    Args:
        model: what `gemma_jax.load` gives.
        text: comes after what is in `memory`, on a new line; for a memory whose sources were not
            read to their end, the same `Documents` again.
        memory: where to start (consumed); nothing by default.
        template: whether the text is the user's turn of the chat template, or part of it; a turn
            that has begun in `memory` goes on in any case.
        chunk_tokens, meter: see `read`.
        keeper: saves the reading while it is under way.

    Raises:
        InputError: no text, or sources that are not those that were read before.
        UsageError: the memory is one to go on with, and `text` cannot be gone on with.
    """
    memory = new_memory(model) if memory is None else memory
    meter = meter or Meter()
    stream = _Stream(model, text, memory, template, tracked=keeper is not None)
    size = chunk_tokens or piece_sizes(model.config)[1]
    begin = int(memory.state.length[0])
    room = room_from(model.config, memory.state, size)
    pieces = pieces_of(meter.count(stream.ids()), size, model.config.vocab_size, room)
    pieces = ahead(pieces, PIECES_AHEAD, give_up=lambda: bool(keeper and keeper.interrupted))
    rest: list[int] = []

    def whole_pieces() -> Iterator[tuple[Any, int]]:
        given = 0
        for piece, count in pieces:
            if count < room(given):  # the last
                rest.extend(piece[0, :count].tolist())
            else:
                yield piece, count
            given += count

    reading = Reading(None, memory.state, 0, 0.0)
    with keeper or contextlib.nullcontext():
        for reading in feed(model, whole_pieces(), memory.state, meter):
            stream.advance(reading.tokens)
            if keeper and keeper.due():
                keeper.keep(stream.unfinished(reading))
        if keeper and keeper.interrupted:
            keeper.keep(stream.unfinished(reading))
    require_whole(reading.state, begin + reading.tokens)
    return stream.finished(reading, rest)


def recall(
    model: Any,
    memory: Memory,
    text: str | Iterable[str] | None = None,
    *,
    template: bool = False,
    chunk_tokens: int | None = None,
    meter: Meter | None = None,
) -> Reading:
    """Reads what is left of a memory (consumed), and more text, to where an answer begins.

    Args:
        text: as in `remember`; None asks for the continuation of what was read.
        template, chunk_tokens, meter: as in `remember`.

    Raises:
        InputError, UsageError: as `remember`.
    """
    if memory.place not in (Place.TEXT, Place.TURN) and text is None:
        raise InputError("There is nothing to read: give some text.")
    stream = _Stream(model, text, memory, template)
    ids = (some for some in stream.all_ids() if some)
    first = next(ids, None)
    if first is None and memory.logits is not None:
        return Reading(jnp.asarray(memory.logits), memory.state, 0, 0.0)
    everything = itertools.chain([] if first is None else [first], ids)
    return read(model, everything, memory.state, chunk_tokens=chunk_tokens, meter=meter)


class _Stream:
    """The ids that come after a memory, and which of the text they stand for."""

    def __init__(
        self,
        model: Any,
        text: str | Iterable[str] | None,
        memory: Memory,
        template: bool,
        *,
        tracked: bool = False,
    ):
        """`tracked`: `unfinished` will be asked for."""
        self._tracked = tracked and hasattr(text, "track")
        if self._tracked:
            text.track()
        self._tokenizer, self._memory, self._text = model.tokenizer, memory, text
        self._turn = _turn(model, memory, template)
        self._begun = memory.place == Place.TURN
        if memory.unread is not None:
            if not hasattr(text, "go_on"):
                raise UsageError("A reading that was interrupted needs its files to go on with.")
            text.go_on(memory.unread)
        before, self._seam = text_lib.opening(
            model.tokenizer, memory.place, self._turn, model.config.bos_id
        )
        ended = bool(before) and memory.place != Place.START
        self._lead = "" if ended else memory.text
        self._before = [*memory.ids, *self._encode(memory.text if ended else ""), *before]
        joined = memory.place in (Place.TEXT, Place.TURN) and not ended and memory.unread is None
        if text is not None and joined:
            self._lead += JOINT
        self._user = UserText(
            itertools.chain([self._lead], self._pieces(text)),
            strips=self._turn is not None and self._turn.strips,
            begun=self._begun,
        )
        self._parts: collections.deque[tuple[int, Sequence[int], int]] = collections.deque()
        self._tail = ""

    @staticmethod
    def _pieces(text: str | Iterable[str] | None) -> Iterable[str]:
        return () if text is None else [text] if isinstance(text, str) else text

    def _encode(self, text: str) -> list[int]:
        return text_lib.encode(self._tokenizer, text) if text else []

    def all_ids(self) -> Iterator[Sequence[int]]:
        """All ids, up to where an answer begins."""
        last, after = text_lib.closing(self._tokenizer, self._turn)
        yield self._before
        pieces = itertools.chain([self._seam], self._user, [last])
        yield from text_lib.encode_stream(self._tokenizer, pieces)
        self._require_text()
        yield after

    def ids(self) -> Iterator[Sequence[int]]:
        """The ids that stay what they are whatever comes after the text; for another thread."""
        parts = text_lib.encode_parts(self._tokenizer, itertools.chain([self._seam], self._user))
        first, end = len(self._before), 0
        self._record(0, self._before, 0)
        yield self._before
        for (part, ids), is_last in _with_last(parts):
            if is_last and text_lib.is_cut(self._tokenizer):
                self._tail = part
                break
            end += len(part)
            self._record(first, ids, end)
            first += len(ids)
            yield ids
        self._require_text()

    def _require_text(self) -> None:
        if self._turn is not None and not self._begun and not self._user.given:
            raise InputError("There is nothing but white space to read: give some text.")

    def finished(self, reading: Reading, rest: Sequence[int]) -> Memory:
        """The memory of all of the text; `rest` are the last of `ids`, which were not read."""
        text = self._tail + self._user.held
        return Memory(
            state=reading.state,
            logits=None if rest or text else reading.logits,
            ids=tuple(rest),
            text=text,
            place=self._place(),
            sources=(*self._memory.sources, *getattr(self._text, "sources", ())),
        )

    def _record(self, first: int, ids: Sequence[int], end: int) -> None:
        """Notes that the ids from `first` on stand for the text up to the character `end`."""
        if self._tracked:
            self._parts.append((first, ids, end))

    def advance(self, given: int) -> None:
        """Forgets where the text was before the model had so many ids."""
        while len(self._parts) > 1 and self._parts[1][0] <= given:
            self._parts.popleft()
        if self._parts and (character := self._character()):
            self._text.forget(character)

    def _character(self) -> int:
        """Of the text, where the first of the parts ends; 0 before it has begun."""
        taken = self._parts[0][2] - len(self._seam) - len(self._lead)
        return taken + self._user.removed if taken > 0 else 0

    def unfinished(self, reading: Reading) -> Memory | None:
        """The memory of the text so far.

        None when the text is not of a kind that can be gone on with, or has not begun.
        """
        self.advance(reading.tokens)
        if not self._parts:
            return None
        first, ids, end = self._parts[0]
        rest = tuple(ids[reading.tokens - first :])
        if end == 0 and self._memory.unread is not None:
            return dataclasses.replace(self._memory, state=reading.state, ids=rest)
        if not (character := self._character()):
            return None
        return Memory(
            state=reading.state,
            ids=rest,
            place=self._place(),
            sources=self._memory.sources,
            unread=self._text.position(character),
        )

    def _place(self) -> str:
        return Place.TEXT if self._turn is None else Place.TURN


def _turn(model: Any, memory: Memory, template: bool) -> Turn | None:
    """What surrounds the text; a conversation that has begun goes on."""
    if not template and memory.place in (Place.START, Place.TEXT):
        return None
    return text_lib.user_turn(model.tokenizer, model.config.bos_id)


def _with_last(items: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
    """The items, each with whether it is the last."""
    items = iter(items)
    for item in items:
        for following in items:
            yield item, False
            item = following
        yield item, True
