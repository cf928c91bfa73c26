"""The user's cache directory, and the compiled programs kept in it."""

import os
from pathlib import Path


def cache_directory() -> Path:
    """`gemma_jax` in the user's cache directory; it may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gemma_jax"


def keep_compiled_programs() -> None:
    """Keeps what JAX compiles for the next start, in the user's cache directory.

    JAX's own `JAX_COMPILATION_CACHE_DIR` and `JAX_ENABLE_COMPILATION_CACHE=false` have their say.
    A directory that cannot be written costs a warning and the time.
    """
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "compiled"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
