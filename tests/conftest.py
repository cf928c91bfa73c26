"""Set-up of all tests: annotated shapes and dtypes are checked wherever the model's functions are called."""

import os
import signal

# What a shell runs in the background ignores Ctrl-C, and so would all processes that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# XLA's threads: the warpgroups of a simulated GPU wait for each other.
os.environ.setdefault("NPROC", "4")
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")  # the user's own is left alone

import jax
import pytest
from jaxtyping import install_import_hook

CHECKED = ("attention", "delta", "layers", "memory", "transformer")
install_import_hook([f"gemma_jax.model.{module}" for module in CHECKED], "beartype.beartype")


@pytest.fixture(scope="module", autouse=True)
def programs_of_a_module_are_dropped():
    """Each compiled program holds memory maps, of which Linux allows a process 65,530."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory):
    """The tiny random model, converted by the ordinary path."""
    from gemma_jax import random_model
    from gemma_jax.checkpoint.convert import convert

    directory = tmp_path_factory.mktemp("random")
    source = random_model.write_hugging_face(directory / "source" / random_model.NAME)
    convert(source, directory / random_model.NAME, dtype="float32")
    return directory / random_model.NAME
