"""Ids into a State, piece by piece."""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax.config import GemmaConfig
from gemma_jax.errors import GemmaError, InputError
from gemma_jax.inference.pieces import PIECES_AHEAD, PIECES_IN_FLIGHT, ahead, pieces_of
from gemma_jax.inference.prefill import piece_sizes, prefill
from gemma_jax.inference.progress import Meter, Progress
from gemma_jax.model.scan import room
from gemma_jax.model.state import State, init_state


@dataclasses.dataclass(frozen=True)
class Reading:
    """What is left of a text that was read: everything needed to continue it."""

    logits: jax.Array  # [1, V] float32, for the token that comes next
    state: State
    tokens: int  # given to the model, BOS included
    tokens_per_second: float


def read(
    model: Any,
    ids: Iterable[Sequence[int]],
    state: State | None = None,
    *,
    chunk_tokens: int | None = None,
    share_read: Callable[[], float | None] = lambda: None,
    on_progress: Callable[[Progress], None] | None = None,
    meter: Meter | None = None,
) -> Reading:
    """Reads a stream of ids to its end, in memory that does not depend on its length.

    `ids` is run in a thread of its own, so that text is tokenised while the model reads. The model
    is always given pieces of the same shape, or of a smaller one where no more is left or fits, so
    texts of any length share two compiled programs at most.

    Args:
        model: what `gemma_jax.load` gives.
        ids: lists of token ids of any lengths; together one text, or what follows the text already
            in `state`.
        state: where to start (batch size 1, consumed); a new text by default.
        chunk_tokens: size of the pieces, in tokens.
        share_read: tells which share of the text (0 to 1) has been tokenised, if that is known.
        on_progress: called after each piece that the device has finished.
        meter: measures this with what was read before, in the place of the two above.

    Raises:
        InputError: no ids, or an id that the model's vocabulary does not have.
        GemmaError: the State became something else than finite numbers.
    """
    config: GemmaConfig = model.config
    state = init_state(config, batch_size=1) if state is None else state
    meter = meter or Meter(share_read, on_progress)
    size = chunk_tokens or piece_sizes(config)[1]
    begin = int(state.length[0])
    pieces = pieces_of(meter.count(ids), size, config.vocab_size, room_from(config, state, size))
    pieces = ahead(pieces, PIECES_AHEAD)
    last = collections.deque(feed(model, pieces, state, meter), maxlen=1)
    if not last:
        raise InputError("There is nothing to read: give some text.")
    reading = last.pop()
    require_whole(reading.state, begin + reading.tokens)
    return dataclasses.replace(reading, tokens_per_second=meter.rate.per_second or 0.0)


def room_from(config: GemmaConfig, state: State, size: int) -> Callable[[int], int]:
    """How many ids `feed` takes in a piece of `size`, by how many were given since `state`."""
    fill, step = int(state.fill[0]), piece_sizes(config)[1]
    return lambda given: room(config, fill + given, size, step)


def feed(
    model: Any, pieces: Iterable[tuple[np.ndarray, int]], state: State, meter: Meter
) -> Iterator[Reading]:
    """Gives pieces to the model, one after the other, and yields what is read after each.

    Each holds no more ids than there is room for, see `room_from`; one that holds few is made smaller,
    see `piece_sizes`. The next piece consumes its State; the device may still be at work on it.

    Raises:
        GemmaError: numbers became something else than finite. What a State carries shows in the
            logits of the piece after, so those are looked at when the device is done with them, and
            the State itself at the end: the host never waits for the newest piece.
    """
    begin = first = int(state.length[0])
    in_flight: collections.deque[tuple[int, jax.Array]] = collections.deque()

    def wait_for_oldest() -> None:
        nonlocal begin
        count, finite = in_flight.popleft()
        if not finite:
            raise GemmaError(_not_finite(model.config, state, begin, begin + count))
        begin += count
        meter.finished(count)

    given, (small, large) = 0, piece_sizes(model.config)
    options = {"config": model.config, "chunk_tokens": large}
    room_of_small = room_from(model.config, state, small)
    for piece, count in pieces:
        if piece.shape[1] == large and count <= room_of_small(given):
            piece = piece[:, :small]
        lengths = np.array([count], np.int32)
        # Of a piece of several steps, those that the last one leaves empty are better skipped.
        fits = piece.shape[1] <= large
        logits, state = prefill(model.params, piece, state, lengths=lengths, fits=fits, **options)
        in_flight.append((count, all_finite(logits)))
        if len(in_flight) > PIECES_IN_FLIGHT:
            wait_for_oldest()
        given += count
        yield Reading(logits, state, given, meter.rate.per_second or 0.0)
    while in_flight:
        wait_for_oldest()
    if given and not _finite_layers(state).all():
        raise GemmaError(_not_finite(model.config, state, first, begin))


def require_whole(state: State, expected: int) -> None:
    """Raises `GemmaError` when a State has not read as many tokens as it was given."""
    if (tokens := int(state.length[0])) != expected:
        raise GemmaError(f"Only {tokens} of {expected} tokens were read: please report this.")


@jax.jit
def all_finite(array: jax.Array) -> jax.Array:
    """Whether all numbers are finite."""
    return jnp.isfinite(array).all()


@jax.jit
def _finite_layers(state: State) -> jax.Array:
    """[layers] bool: whether all that a layer carries is finite."""
    leaves = [jax.tree.leaves(layer) for layer in state.layers]
    return jnp.stack([jnp.stack([jnp.isfinite(x).all() for x in some]).all() for some in leaves])


def _not_finite(config: GemmaConfig, state: State, begin: int, end: int) -> str:
    """What is said of a State that has met numbers which are not finite from `begin` to `end`."""
    length, finite = config.memory.segment_length, np.asarray(_finite_layers(state))
    what = "The logits are" if finite.all() else f"The State of layer {finite.argmin()} is"
    first, last = begin // length, (end - 1) // length
    segments = f"segment {first}" if first == last else f"segments {first} to {last}"
    return (
        f"{what} not finite after tokens {begin} to {end - 1} ({segments}): check the checkpoint, or"
        " convert it with --dtype float32."
    )
