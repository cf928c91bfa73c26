"""Reading memory and mixing what was found with local attention, in one pass, for Hopper GPUs.

Queries and results are bfloat16; memory is float32 and enters as the sum of two bfloat16 numbers, which
keeps 16 bits of its fraction: far more than the result holds. Triton (Pallas).
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

ROWS = 128  # query heads of tokens, of a program
DEPTH = 16  # of one step of the product

dot = functools.partial(jnp.dot, preferred_element_type=jnp.float32)


def takes(tokens: int, group: int, head_dim: int) -> bool:
    """Whether the kernel divides these shapes evenly."""
    power_of_two = group & (group - 1) == 0 and head_dim & (head_dim - 1) == 0
    return power_of_two and head_dim >= DEPTH and group <= ROWS and tokens % (ROWS // group) == 0


@functools.partial(jax.jit, static_argnames=("eps", "interpret"))
def add_normalized_read(
    q: Float[Array, "B T H C"],
    attended: Float[Array, "B T H C"],
    memory: Float[Array, "B K C C"],
    gate: Float[Array, " H"],
    *,
    eps: float = 1e-6,
    interpret: bool = False,
) -> Float[Array, "B T H C"]:
    """attended + gate * rms_norm(l2_normalize(q) M)."""
    kernel = functools.partial(_add_normalized, eps=eps)
    return _read(kernel, q, attended, memory, None, gate, interpret)


@functools.partial(jax.jit, static_argnames=("interpret",))
def mix_linear_read(
    q: Float[Array, "B T H C"],
    attended: Float[Array, "B T H C"],
    memory: Float[Array, "B K C C"],
    total: Float[Array, "B K C"],
    weight: Float[Array, " H"],
    *,
    interpret: bool = False,
) -> Float[Array, "B T H C"]:
    """weight * phi(q) M / phi(q) z + (1 - weight) * attended, with phi = ELU + 1; 0 is read while z is."""
    return _read(_mix_linear, q, attended, memory, total, weight, interpret)


def _read(kernel, q, attended, memory, total, gate, interpret):
    batch, length, heads, dim = q.shape
    kv_heads = memory.shape[1]
    group = heads // kv_heads
    tokens = ROWS // group
    high = jax.lax.reduce_precision(memory, exponent_bits=8, mantissa_bits=7)
    low = (memory - high).astype(q.dtype)
    here = pl.BlockSpec((None, tokens, group, dim), lambda b, t, k: (b, t, k, 0))
    matrix = pl.BlockSpec((None, None, dim, dim), lambda b, t, k: (b, k, 0, 0))
    vector = pl.BlockSpec((None, None, dim), lambda b, t, k: (b, k, 0))
    operands = [(q, here), (attended, here), (high.astype(q.dtype), matrix), (low, matrix)]
    operands += [(total, vector)] if total is not None else []
    operands += [(gate, pl.BlockSpec((group,), lambda b, t, k: (k,)))]
    return pl.pallas_call(
        kernel,
        grid=(batch, length // tokens, kv_heads),
        in_specs=[spec for _, spec in operands],
        out_specs=here,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=4),
        interpret=interpret,
    )(*[operand for operand, _ in operands])


def _add_normalized(q_ref, attended_ref, high_ref, low_ref, gate_ref, out_ref, *, eps):
    tokens, group, dim = q_ref.shape

    def step(i, carry):
        found, square = carry
        depth = pl.ds(i * DEPTH, DEPTH)
        q = q_ref[:, :, depth].reshape(ROWS, DEPTH)
        for part in (high_ref, low_ref):
            found += dot(q, part[depth, :])
        q = q.astype(jnp.float32)
        return found, square + jnp.sum(q * q, axis=1)

    start = jnp.zeros((ROWS, dim), jnp.float32), jnp.zeros((ROWS,), jnp.float32)
    found, square = jax.lax.fori_loop(0, dim // DEPTH, step, start)
    found *= jax.lax.rsqrt(square + eps)[:, None]
    found *= jax.lax.rsqrt(jnp.sum(found * found, axis=1) / dim + eps)[:, None]
    found = found.reshape(tokens, group, dim) * gate_ref[...][None, :, None]
    out_ref[...] = (attended_ref[...].astype(jnp.float32) + found).astype(out_ref.dtype)


def _mix_linear(q_ref, attended_ref, high_ref, low_ref, total_ref, gate_ref, out_ref):
    tokens, group, dim = q_ref.shape

    def step(i, carry):
        found, total = carry
        depth = pl.ds(i * DEPTH, DEPTH)
        q = q_ref[:, :, depth].reshape(ROWS, DEPTH).astype(jnp.float32)
        phi = jnp.where(q > 0.0, q + 1.0, jnp.exp(jnp.minimum(q, 0.0)))
        high = phi.astype(q_ref.dtype)
        low = (phi - high.astype(jnp.float32)).astype(q_ref.dtype)
        for one, part in ((high, high_ref), (high, low_ref), (low, high_ref)):
            found += dot(one, part[depth, :])
        return found, total + jnp.sum(phi * total_ref[depth][None, :], axis=1)

    start = jnp.zeros((ROWS, dim), jnp.float32), jnp.zeros((ROWS,), jnp.float32)
    found, total = jax.lax.fori_loop(0, dim // DEPTH, step, start)
    found *= jnp.where(total == 0.0, 0.0, 1.0 / jnp.where(total == 0.0, 1.0, total))[:, None]
    weight = gate_ref[...][None, :, None]
    mixed = weight * found.reshape(tokens, group, dim)
    mixed += (1.0 - weight) * attended_ref[...].astype(jnp.float32)
    out_ref[...] = mixed.astype(out_ref.dtype)
