"""The same numbers every time on a GPU too, when XLA is asked for them in XLA_FLAGS.

XLA then adds in one order, and chooses kernels without timing them. Two things that the model does
otherwise do not go with it: a gradient that is scattered takes XLA a step of a loop for each row, and
cuDNN's attention fails in the backward pass of two layers alike (openxla/xla pull request 46500).
XLA_FLAGS is read as flags, not as the name of a file with flags.
"""

import os

DETERMINISTIC = "--xla_gpu_deterministic_ops"
# All flags by which XLA is asked; the second leaves the choice of kernels as it is.
FLAGS = (DETERMINISTIC, "--xla_gpu_exclude_nondeterministic_ops")


def ask() -> None:
    """Asks XLA, which must not have begun yet."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC}=true".strip()


def is_asked() -> bool:
    """Whether XLA is asked; programs must be traced again where that has changed."""
    given = (flag.partition("=") for flag in os.environ.get("XLA_FLAGS", "").split())
    last = {name: value.lower() in ("", "1", "true") for name, _, value in given if name in FLAGS}
    return any(last.values())
