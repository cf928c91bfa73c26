"""A step compiled for sequences of several lengths, ahead of its use and beside the training."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

THREADS = 2


class Programs:
    """What `compile_for` makes of each length; begun in the order given. Use it as a context."""

    def __init__(self, compile_for: Callable[[int], Any], lengths: Sequence[int]):
        self._pool = ThreadPoolExecutor(THREADS, "gemma_jax compilation")
        self._made = {length: self._pool.submit(compile_for, length) for length in lengths}

    def __enter__(self) -> "Programs":
        return self

    def __exit__(self, *_: Any) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def __getitem__(self, length: int) -> Any:
        """Waits until it is compiled; raises what went wrong with it."""
        return self._made[length].result()
