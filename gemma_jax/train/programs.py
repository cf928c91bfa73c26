"""A step compiled for sequences of several lengths, ahead of its use and beside the training.

Only compilation runs in threads of its own: tracing in several at once fails now and then.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

THREADS = max(1, min(4, (os.cpu_count() or 1) // 2))


class Programs:
    """The programs that `lower` gives for each length, compiled in that order. Use it as a context."""

    def __init__(self, lower: Callable[[int], jax.stages.Lowered], lengths: Sequence[int]):
        self._pool = ThreadPoolExecutor(THREADS, "gemma_jax compilation")
        self._made = {length: self._pool.submit(lower(length).compile) for length in lengths}

    def __enter__(self) -> "Programs":
        return self

    def __exit__(self, *_: Any) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def wait(self) -> None:
        """Until the first of them is compiled; raises what went wrong with it."""
        next(iter(self._made.values())).result()

    def __getitem__(self, length: int) -> Any:
        """Waits until it is compiled; raises what went wrong with it."""
        return self._made[length].result()
