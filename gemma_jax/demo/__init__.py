"""The small model that comes with gemma_jax, and a demonstration of what it remembers.

`model/` is an ordinary checkpoint. It is what `run.py` asks when no other is named;
`python -m gemma_jax.demo` plants facts in a long text, has it read, and asks for them.
"""

from pathlib import Path

from gemma_jax.errors import InputError

MODEL = Path(__file__).parent / "model"


def checkpoint() -> Path:
    """Where the small model is.

    Raises:
        InputError: this installation came without it.
    """
    if not MODEL.is_dir():
        raise InputError(
            f"The small model is missing from this installation ({MODEL}): name a checkpoint of"
            " convert_weights.py with --model, or install gemma_jax again."
        )
    return MODEL


def suitable_dtype() -> str | None:
    """What a small model is best loaded as: float32 on CPUs, where it is faster; else as recorded."""
    import jax

    return "float32" if jax.default_backend() == "cpu" else None
