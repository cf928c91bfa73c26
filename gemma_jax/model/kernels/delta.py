"""What a segment does to a delta-rule memory, for Hopper GPUs.

The map M -> keep M + add of a segment acts on each column of [keep | add] alone: a program takes some
columns through the segment's blocks one after the other, in registers. That costs half the work of
joining the maps of blocks in pairs. Triton (Pallas).

Keys are bfloat16 before they are normalised, so products with them are exact in one pass of the tensor
cores; a float32 factor enters as a sum of `PARTS` bfloat16 numbers, one pass for each.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

BLOCK = 64  # tokens
COLUMNS = 32  # of a program
PARTS = 3  # bfloat16 numbers of 8 bits make up a float32's 24


def takes(key_dim: int, value_dim: int) -> bool:
    """Whether the kernels divide these shapes evenly."""
    return all(dim >= COLUMNS and dim & (dim - 1) == 0 for dim in (key_dim, value_dim))


@functools.partial(jax.jit, static_argnames=("interpret",))
def delta_map(
    key: Float[Array, "N S F"],
    length: Float[Array, "N S"],
    value: Float[Array, "N S C"],
    gate: Float[Array, "N S"],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "N F F"], Float[Array, "N F C"]]:
    """(keep, add) of N segments; `gemma_jax.model.delta.delta_map` says of what.

    Args:
        key: as it is in State, bfloat16.
        length: what keys are divided by, float32.
        value: bfloat16.
        gate: float32.
    """
    number, tokens, key_dim = key.shape
    value_dim, pad = value.shape[-1], -tokens % BLOCK
    key, value = (jnp.pad(x, ((0, 0), (0, pad), (0, 0))) for x in (key, value))
    inverse_length = jnp.pad(1.0 / length, ((0, 0), (0, pad)))
    gate = jnp.pad(gate, ((0, 0), (0, pad)))
    blocks = key.shape[1] // BLOCK

    def of_block(*rest):
        return pl.BlockSpec((None, BLOCK, *rest), lambda n, b: (n, b, *[0] * len(rest)))

    def of_segment(x):
        return pl.BlockSpec((None, *x.shape[1:]), lambda n, c: (n, *[0] * (x.ndim - 1)))

    solved = pl.pallas_call(
        _solve,
        grid=(number, blocks),
        in_specs=[of_block(key_dim), of_block(), of_block()],
        out_specs=of_block(BLOCK),
        out_shape=jax.ShapeDtypeStruct((number, blocks * BLOCK, BLOCK), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=2),
        interpret=interpret,
    )(key, inverse_length, gate)
    # Three passes of the tensor cores are as exact as float32; CPUs do not know them.
    precision = "highest" if interpret else lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    operands = (key, inverse_length, value, solved)
    out = pl.pallas_call(
        functools.partial(_apply, blocks=blocks, precision=precision),
        grid=(number, (key_dim + value_dim) // COLUMNS),
        in_specs=[of_segment(x) for x in operands],
        out_specs=pl.BlockSpec((None, key_dim, COLUMNS), lambda n, c: (n, 0, c)),
        out_shape=jax.ShapeDtypeStruct((number, key_dim, key_dim + value_dim), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
    )(*operands)
    return out[..., :key_dim], out[..., key_dim:]


def _product(exact, x):
    """`exact` (bfloat16) times x (float32), in float32."""
    total = None
    for _ in range(PARTS):
        part = x.astype(jnp.bfloat16)
        term = jnp.dot(exact, part, preferred_element_type=jnp.float32)
        total = term if total is None else total + term
        x = x - part.astype(jnp.float32)
    return total


def _solve(key_ref, scale_ref, gate_ref, out_ref):
    """(I + tril(diag(gate) K K^T, -1))^-1 diag(gate) of a block, row by row."""
    key, scale, gate = key_ref[...], scale_ref[...], gate_ref[...]
    row = lax.broadcasted_iota(jnp.int32, (BLOCK, BLOCK), 0)
    column = lax.broadcasted_iota(jnp.int32, (BLOCK, BLOCK), 1)
    overlap = jnp.dot(key, key.T, preferred_element_type=jnp.float32)
    overlap = jnp.where(row > column, (gate * scale)[:, None] * overlap * scale[None, :], 0.0)

    def substitute(i, inverse):
        factors = jnp.sum(jnp.where(row == i, overlap, 0.0), axis=0)
        change = jnp.sum(factors[:, None] * inverse, axis=0)
        return jnp.where(row == i, inverse - change[None, :], inverse)

    inverse = lax.fori_loop(1, BLOCK, substitute, jnp.where(row == column, 1.0, 0.0))
    out_ref[...] = inverse * gate[None, :]


def _apply(key_ref, scale_ref, value_ref, solved_ref, out_ref, *, blocks, precision):
    """Some columns of [keep | add]: those of [I | 0], taken through all blocks."""
    key_dim = key_ref.shape[-1]
    first = pl.program_id(1) * COLUMNS
    row = lax.broadcasted_iota(jnp.int32, (key_dim, COLUMNS), 0)
    column = lax.broadcasted_iota(jnp.int32, (key_dim, COLUMNS), 1) + first
    adds = first >= key_dim
    value_at = pl.ds(jnp.where(adds, first - key_dim, 0), COLUMNS)

    def step(b, columns):
        tokens = pl.ds(b * BLOCK, BLOCK)
        key, scale = key_ref[tokens, :], scale_ref[tokens][:, None]
        wanted = jnp.where(adds, value_ref[tokens, value_at].astype(jnp.float32), 0.0)
        wanted = wanted - scale * _product(key, columns)
        change = jnp.dot(solved_ref[tokens, :], wanted, precision=precision)
        return columns + _product(key.T, scale * change)

    out_ref[...] = lax.fori_loop(0, blocks, step, jnp.where(row == column, 1.0, 0.0))
