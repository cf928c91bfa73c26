"""Reading a delta-rule memory and adding what was found, in one pass, for NVIDIA GPUs.

Queries are bfloat16; memory is float32 and enters as the sum of two bfloat16 numbers, which keeps 16
bits of its fraction: far more than the bfloat16 result holds. Triton (Pallas).
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

ROWS = 64  # query heads of tokens, of a program
DEPTH = 64  # of one step of the product


def takes(tokens: int, group: int, head_dim: int) -> bool:
    """Whether the kernel divides these shapes evenly."""
    power_of_two = group & (group - 1) == 0 and head_dim & (head_dim - 1) == 0
    return power_of_two and group <= ROWS and tokens % (ROWS // group) == 0


def add_normalized_read(
    q: Float[Array, "B T H C"],
    attended: Float[Array, "B T H C"],
    memory: Float[Array, "B K C C"],
    gate: Float[Array, " H"],
    *,
    eps: float,
    interpret: bool = False,
) -> Float[Array, "B T H C"]:
    """attended + gate * rms_norm(l2_normalize(q) M)."""
    batch, length, heads, dim = q.shape
    kv_heads = memory.shape[1]
    group = heads // kv_heads
    tokens = ROWS // group
    high = jax.lax.reduce_precision(memory, exponent_bits=8, mantissa_bits=7)
    low = (memory - high).astype(q.dtype)
    here = pl.BlockSpec((None, tokens, group, dim), lambda b, t, k: (b, t, k, 0))
    matrix = pl.BlockSpec((None, None, dim, dim), lambda b, t, k: (b, k, 0, 0))
    return pl.pallas_call(
        functools.partial(_read, eps=eps),
        grid=(batch, length // tokens, kv_heads),
        in_specs=[here, here, matrix, matrix, pl.BlockSpec((group,), lambda b, t, k: (k,))],
        out_specs=here,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
    )(q, attended, high.astype(q.dtype), low, gate)


def _read(q_ref, attended_ref, high_ref, low_ref, gate_ref, out_ref, *, eps):
    tokens, group, dim = q_ref.shape

    def step(i, carry):
        found, square = carry
        depth = pl.ds(i * DEPTH, DEPTH)
        q = q_ref[:, :, depth].reshape(ROWS, DEPTH)
        for part in (high_ref, low_ref):
            found += jnp.dot(q, part[depth, :], preferred_element_type=jnp.float32)
        q = q.astype(jnp.float32)
        return found, square + jnp.sum(q * q, axis=1)

    start = jnp.zeros((ROWS, dim), jnp.float32), jnp.zeros((ROWS,), jnp.float32)
    found, square = jax.lax.fori_loop(0, dim // DEPTH, step, start)
    found *= jax.lax.rsqrt(square + eps)[:, None]
    found *= jax.lax.rsqrt(jnp.sum(found * found, axis=1) / dim + eps)[:, None]
    found = found.reshape(tokens, group, dim) * gate_ref[...][None, :, None]
    out_ref[...] = (attended_ref[...].astype(jnp.float32) + found).astype(out_ref.dtype)
