"""Compilation that suits tests: it is quick, and what is compiled need not run fast."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache


@contextlib.contextmanager
def quick_compilation(directory: Path) -> Iterator[None]:
    """What is compiled within is not optimised, and kept in a directory for the next time."""
    inside = {
        "jax_enable_compilation_cache": True,
        "jax_compilation_cache_dir": str(directory),
        "jax_persistent_cache_min_compile_time_secs": 0.5,
        "jax_disable_most_optimizations": True,
    }
    before = {name: jax.config.values[name] for name in inside}
    _configure(inside)
    try:
        yield
    finally:
        _configure(before)


def _configure(settings: dict[str, object]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
