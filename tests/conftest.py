"""Set-up of all tests: annotated shapes and dtypes are checked wherever the model's functions are called."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")  # the user's own is left alone

from jaxtyping import install_import_hook

CHECKED = ("attention", "delta", "layers", "memory", "transformer")
install_import_hook([f"gemma_jax.model.{module}" for module in CHECKED], "beartype.beartype")
