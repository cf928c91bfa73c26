"""Kernels for NVIDIA's Hopper GPUs, written in Pallas; each does what a few lines of the model say, faster.

Those lines stay where they are: they run on every other device, give the gradient, and are what the
kernels are tested against. `GEMMA_JAX_KERNELS=off` in the environment leaves the kernels out.
"""

import os
import re
from collections.abc import Callable

import jax

from gemma_jax.model.device import default_device

AMPERE, HOPPER = 8, 9  # compute capabilities
CUDA = 13_000  # the first version the kernels were measured with; some before it miscompile masks


def compute_capability() -> int:
    """Of the NVIDIA GPU that programs run on; 0 where there is none."""
    device = default_device()
    if device.platform != "gpu" or "cuda" not in device.client.platform_version:
        return 0
    return int(device.compute_capability.split(".")[0])


def wanted() -> bool:
    """Whether the kernels are to be used here."""
    if os.environ.get("GEMMA_JAX_KERNELS", "on") == "off" or compute_capability() != HOPPER:
        return False
    version = re.search(r"cuda (\d+)", default_device().client.platform_version)
    return version is None or int(version[1]) >= CUDA


def lays_out_registers() -> bool:
    """Whether this version of JAX compiles `layer` and `matvec`: others lay out registers otherwise."""
    return jax.__version_info__[:2] == (0, 11)


def with_gradient_of(plain: Callable, kernel: Callable) -> Callable:
    """`kernel`, differentiated as `plain`, which computes the same."""

    @jax.custom_vjp
    def function(*args):
        return kernel(*args)

    function.defvjp(lambda *args: jax.vjp(plain, *args), lambda vjp, gradient: vjp(gradient))
    return function
