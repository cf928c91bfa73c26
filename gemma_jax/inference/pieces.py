"""Streams of ids in pieces of one shape, made ahead of the model that reads them."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from gemma_jax.errors import InputError

PIECES_AHEAD = 4  # pieces of ids that wait for the model; bounds what the tokenizer holds
PIECES_IN_FLIGHT = 2  # pieces given to the device before the host waits for the oldest
WAKE_SECONDS = 0.1  # between two looks at whether anybody still wants what is waited for

T = TypeVar("T")


def pieces_of(
    ids: Iterable[Sequence[int]],
    size: int,
    vocab_size: int,
    room: Callable[[int], int] | None = None,
) -> Iterator[tuple[np.ndarray, int]]:
    """Pieces [1, size] int32, all of one shape (padded with zeros), and how many ids each holds: all
    it can but for the last, or as many as `room` says of a piece that begins after so many ids.
    """
    piece, count, given = np.zeros((1, size), np.int32), 0, 0
    most = size if room is None else room(0)
    for some in ids:
        some = np.asarray(some, np.int32)
        if some.size and some.max() >= vocab_size:
            raise InputError(
                f"The tokenizer gives id {some.max()}, but the model's vocabulary has"
                f" {vocab_size}: tokenizer and model do not belong together."
            )
        while some.size:
            taken = min(some.size, most - count)
            piece[0, count : count + taken] = some[:taken]
            some, count = some[taken:], count + taken
            if count == most:
                yield piece, count
                given += count
                piece, count = np.zeros((1, size), np.int32), 0
                most = size if room is None else room(given)
    if count:
        yield piece, count


def ahead(
    items: Iterable[T], depth: int, *, give_up: Callable[[], bool] = lambda: False
) -> Iterator[T]:
    """The same items, produced by a thread that runs at most `depth` ahead and stops when nobody
    asks any more. They end early when `give_up` says so while one is waited for.
    """
    results: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
    stopped = threading.Event()

    def put(item: T | None, error: BaseException | None = None) -> None:
        while not stopped.is_set():
            try:
                return results.put((item, error), timeout=WAKE_SECONDS)
            except queue.Full:
                continue

    def produce() -> None:
        try:
            for item in items:
                put(item)
                if stopped.is_set():
                    return
            put(None, StopIteration())
        except BaseException as error:
            put(None, error)

    threading.Thread(target=produce, name="gemma_jax tokenizer", daemon=True).start()
    try:
        while True:
            try:
                item, error = results.get(timeout=WAKE_SECONDS)
            except queue.Empty:
                if give_up():
                    return
                continue
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        stopped.set()
