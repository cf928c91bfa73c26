"""Weight matrices and products with them.

A matrix is kept as [out, in], as Hugging Face keeps it: the numbers that one output needs lie side by
side, which is how a product with one token reads fastest. In int8, every output has its own scale, and
the matrix is `values * scale[:, None]` (symmetric, to the nearest of -127 to 127).
"""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int, Shaped

from gemma_jax.model import determinism, kernels

INIT = nn.initializers.normal(0.02)
LARGEST = 127  # of int8, which has one number more below zero than above
ROWS_QUANTIZED = 4096  # at once
ROWS_ADDED = 1024  # likewise, to a gradient; one-hot rows of 262,144 take .5 GB in bfloat16
SCALE = "_scale"  # ends the name of the parameter that holds a matrix's scales


@struct.dataclass
class Weight:
    """A matrix [out, in]; with `scale`, float32, one per output, its values are int8."""

    values: Shaped[Array, "N K"]
    scale: Float[Array, " N"] | None = None

    def dense(self, dtype) -> Float[Array, "N K"]:
        return dequantize(self.values, self.scale, dtype)

    def rows(self, indices: Int[Array, "*b"], dtype) -> Float[Array, "*b K"]:
        """Some of its rows."""
        if self.scale is None:
            asked = determinism.is_asked()
            found = _look_up(self.values, indices) if asked else self.values[indices]
            return found.astype(dtype)
        return dequantize(self.values[indices], self.scale[indices], dtype)


def dequantize(values: Array, scale: Array | None, dtype) -> Array:
    """Rows [..., K] as they are computed with; one scale [...] each, if they are int8."""
    if scale is None:
        return values.astype(dtype)
    return (values.astype(jnp.float32) * scale[..., None]).astype(dtype)


def quantize(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 values [N, K] and float32 scales [N] of a matrix [N, K]: the largest of a row becomes 127."""
    values, scale = np.empty(matrix.shape, np.int8), np.empty(len(matrix), np.float32)
    for start in range(0, len(matrix), ROWS_QUANTIZED):
        some = slice(start, start + ROWS_QUANTIZED)
        rows = matrix[some].astype(np.float32)
        scale[some] = np.abs(rows).max(axis=1) / LARGEST
        values[some] = np.rint(rows / np.where(scale[some] > 0.0, scale[some], 1.0)[:, None])
    return values, scale


def declare_weight(
    module: nn.Module,
    name: str,
    axes: tuple[str, str],
    shape: tuple[int, int],
    dtype,
    quantized: bool,
) -> Weight:
    """The parameters of a matrix: `name`, and `name_scale` if it is in int8."""
    if not quantized:
        return Weight(module.param(name, nn.with_logical_partitioning(INIT, axes), shape, dtype))

    def integers(key, shape, dtype):
        return jax.random.randint(key, shape, -LARGEST, LARGEST + 1, dtype)

    spread = LARGEST / math.sqrt(3.0)  # of such integers
    scale = nn.initializers.constant(0.02 / spread)
    return Weight(
        module.param(name, nn.with_logical_partitioning(integers, axes), shape, jnp.int8),
        module.param(
            name + SCALE, nn.with_logical_partitioning(scale, axes[:1]), shape[:1], jnp.float32
        ),
    )


@jax.custom_vjp
def _look_up(values: Float[Array, "N K"], indices: Int[Array, "*b"]) -> Float[Array, "*b K"]:
    """The rows of `values`, by indices from 0, with a gradient that is no scatter but products with
    one-hot rows: as much work as another head's gradient."""
    return values[indices]


def _look_up_forward(values: Array, indices: Array) -> tuple[Array, tuple[Array, Array]]:
    return values[indices], (indices, values)


def _look_up_backward(kept: tuple[Array, Array], slope: Array) -> tuple[Array, None]:
    indices, values = kept[0].reshape(-1), kept[1]
    slope = slope.reshape(-1, slope.shape[-1])
    rows = max(min(ROWS_ADDED, len(indices)), 1)
    more = -len(indices) % rows
    indices = jnp.pad(indices, (0, more), constant_values=len(values))  # rows of zeros
    slope = jnp.pad(slope, ((0, more), (0, 0)))

    def add(total: Array, some: tuple[Array, Array]) -> tuple[Array, None]:
        one_hot = jax.nn.one_hot(some[0], len(total), dtype=slope.dtype)
        added = jnp.einsum(
            "TN,TK->NK", one_hot, some[1], precision="highest", preferred_element_type=total.dtype
        )
        return total + added, None

    parts = [x.reshape(-1, rows, *x.shape[1:]) for x in (indices, slope)]
    total, _ = jax.lax.scan(add, jnp.zeros(values.shape, jnp.float32), tuple(parts))
    return total.astype(values.dtype), None


_look_up.defvjp(_look_up_forward, _look_up_backward)


def product(x: Float[Array, "*b K"], weight: Weight, dtype=None) -> Float[Array, "*b N"]:
    """x W^T, summed in float32, rounded to `dtype` (that of x by default)."""
    if math.prod(x.shape[:-1]) == 1 and jax.default_backend() == "gpu":
        return product_of_one(x, weight, dtype)
    return jnp.einsum(
        "...K,NK->...N", x, weight.dense(x.dtype), preferred_element_type=dtype or x.dtype
    )


def product_apart(
    x: Float[Array, "*b K"], weight: Weight, widths: tuple[int, ...]
) -> list[Float[Array, "*b _"]]:
    """The columns of x W^T in arrays of these widths, one after the other."""

    def plain(x: Array, weight: Weight) -> list[Array]:
        return jnp.split(product(x, weight), np.cumsum(widths)[:-1].tolist(), axis=-1)

    if x.dtype != jnp.bfloat16 or not kernels.wanted():
        return plain(x, weight)
    from gemma_jax.model.kernels import products as kernel

    rows, width = math.prod(x.shape[:-1]), x.shape[-1]
    if not kernel.takes_apart(rows, width, widths):
        return plain(x, weight)

    def apart(x: Array, weight: Weight) -> list[Array]:
        found = kernel.product_apart(
            x.reshape(rows, width), weight.dense(x.dtype), widths=tuple(widths)
        )
        return [part.reshape(*x.shape[:-1], -1) for part in found]

    return kernels.with_gradient_of(plain, apart)(x, weight)


def product_in_halves(
    x: Float[Array, "*b K"], weight: Weight
) -> tuple[Float[Array, "*b _"], Float[Array, "*b _"]]:
    """The first half of the columns of x W^T, and the last."""
    plain = x.dtype == weight.values.dtype == jnp.bfloat16
    if plain and kernels.compute_capability() >= kernels.AMPERE:
        return _apart_in_gradient(x, weight.values)
    return _halves(x, weight)


def _halves(x: Array, weight: Weight) -> tuple[Array, Array]:
    return tuple(jnp.split(product(x, weight), 2, axis=-1))


@jax.custom_vjp
def _apart_in_gradient(x: Float[Array, "*b K"], matrix: Float[Array, "N K"]) -> tuple[Array, Array]:
    """The halves, with a gradient that is not joined from theirs before it is multiplied: of a long
    sequence that is a large copy. Has no forward-mode derivative."""
    return _halves(x, Weight(matrix))


def _halves_and_operands(
    x: Array, matrix: Array
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    return _halves(x, Weight(matrix)), (x, matrix)


def _gradients_apart(kept: tuple[Array, Array], slopes: tuple[Array, Array]) -> tuple[Array, Array]:
    x, matrix = kept
    first, last = (
        jnp.einsum("...N,NK->...K", slope, half, preferred_element_type=jnp.float32)
        for slope, half in zip(slopes, jnp.split(matrix, 2), strict=True)
    )
    rows = x.reshape(-1, x.shape[-1])
    of_halves = [jnp.einsum("TN,TK->NK", slope.reshape(len(rows), -1), rows) for slope in slopes]
    return (first + last).astype(x.dtype), jnp.concatenate(of_halves)


_apart_in_gradient.defvjp(_halves_and_operands, _gradients_apart)


def product_of_one(x: Float[Array, "*b K"], weight: Weight, dtype=None) -> Float[Array, "*b N"]:
    """The same for a single row: sums along the rows of the matrix, which a GPU reads but once."""

    def plain(row: Array, weight: Weight) -> Array:
        found = jnp.sum(weight.values.astype(jnp.float32) * row.astype(jnp.float32), axis=1)
        return found if weight.scale is None else found * weight.scale

    found = _fastest_of_one(plain, x, weight)(x.reshape(-1), weight)
    return found.astype(dtype or x.dtype).reshape(*x.shape[:-1], -1)


def _fastest_of_one(plain: Callable, x: Array, weight: Weight) -> Callable:
    """`plain`, or the kernel that does the same where it takes such a matrix."""
    if weight.scale is None or x.dtype != jnp.bfloat16 or not kernels.wanted():
        return plain
    from gemma_jax.model.kernels import matvec as kernel

    if not (kernels.lays_out_registers() and kernel.takes(*weight.values.shape)):
        return plain

    def streamed(row: Array, weight: Weight) -> Array:
        return kernel.product_of_one(row, weight.values, weight.scale)

    return kernels.with_gradient_of(plain, streamed)
