"""Attention and memory of one new token a row, for Hopper GPUs: kernels for decoding.

A single token leaves most of a GPU idle unless its window is divided: `attend` gives every program a
few keys, which it rotates as it reads them, and joins the partial softmaxes (as Flash-Decoding does).
`add_normalized_read` and `mix_linear_read` read memory for one token. Triton (Pallas).
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

KEYS = 32  # of one step of a program
PROGRAMS = 128  # about one per multiprocessor
HEADS = 16  # the fewest rows that tensor cores multiply; a group of fewer is repeated
DEPTH = 64  # rows of memory in one step
NOTHING = -1e30  # score of what is not seen

dot = functools.partial(jnp.dot, preferred_element_type=jnp.float32)


def takes(window: int, group: int, head_dim: int) -> bool:
    """Whether the kernels divide these shapes evenly."""
    power_of_two = head_dim & (head_dim - 1) == 0
    return window % KEYS == 0 and group <= HEADS and power_of_two and head_dim >= DEPTH


@functools.partial(jax.jit, static_argnames=("scale", "softcap", "interpret"))
def attend(
    q: Float[Array, "B H C"],
    keys: Float[Array, "B L K C"],
    values: Float[Array, "B L K C"],
    sink: tuple[Float[Array, "B 1 K C"], Float[Array, "B 1 K C"]],
    seen: Int[Array, "B 3"],
    cosine: Float[Array, "L1 C/2"],
    sine: Float[Array, "L1 C/2"],
    *,
    scale: float,
    softcap: float | None = None,
    interpret: bool = False,
) -> Float[Array, "B H C"]:
    """Attention of one query a row over its window and the sink, neither rotated yet.

    Args:
        seen: the first key of the window that is seen, the last (the query's own), and whether the
            sink is seen (0 or 1).
        cosine, sine: of positions 0 (the sink's) to L; key i stands at i + 1.
    """
    (batch, window, kv_heads, dim), heads = keys.shape, q.shape[1]
    group, steps = heads // kv_heads, window // KEYS
    steps_each = 1 << max(batch * kv_heads * steps // PROGRAMS, 1).bit_length() - 1
    programs = pl.cdiv(steps, steps_each)
    kernel = functools.partial(
        _attend, group=group, steps_each=steps_each, scale=scale, softcap=softcap
    )
    row = pl.BlockSpec((None, group, dim), lambda b, k, i: (b, k, 0))
    stream = pl.BlockSpec((None, window, None, dim), lambda b, k, i: (b, 0, k, 0))
    first = pl.BlockSpec((None, None, None, dim), lambda b, k, i: (b, 0, k, 0))
    table = pl.BlockSpec(cosine.shape, lambda b, k, i: (0, 0))
    part = pl.BlockSpec((None, None, None, HEADS, dim), lambda b, k, i: (b, k, i, 0, 0))
    number = pl.BlockSpec((None, None, None, HEADS), lambda b, k, i: (b, k, i, 0))
    parts = (batch, kv_heads, 1 << (programs - 1).bit_length(), HEADS)  # `_join` needs a power of 2
    found = pl.pallas_call(
        kernel,
        grid=(batch, kv_heads, programs),
        in_specs=[row, stream, stream, first, first]
        + [pl.BlockSpec((None, 3), lambda b, k, i: (b, 0)), table, table],
        out_specs=[part, number, number],
        out_shape=[
            jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((*parts, dim), parts, parts)
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        name="attend_one",
        interpret=interpret,
    )(q, keys, values, *sink, seen, cosine, sine)
    return _join(*found, programs=programs, like=q, interpret=interpret)


def _attend(
    q_ref,
    key_ref,
    value_ref,
    sink_key_ref,
    sink_value_ref,
    seen_ref,
    cosine_ref,
    sine_ref,
    out_ref,
    best_ref,
    total_ref,
    *,
    group,
    steps_each,
    scale,
    softcap,
):
    program, half, dtype = pl.program_id(2), q_ref.shape[1] // 2, q_ref.dtype
    first, last, sees_sink = seen_ref[0], seen_ref[1], seen_ref[2]
    begin = program * steps_each * KEYS
    row = jax.lax.broadcasted_iota(jnp.int32, (HEADS,), 0) % group
    halves = (pl.ds(0, half), pl.ds(half, half))
    q = [q_ref[row, part].astype(jnp.float32) for part in halves]

    def turned(position):  # the query, rotated
        cosine, sine = cosine_ref[position, :][None], sine_ref[position, :][None]
        return q[0] * cosine - q[1] * sine, q[1] * cosine + q[0] * sine

    def cap(score):
        if softcap is None:
            return score * scale
        return softcap * (1.0 - 2.0 / (jnp.exp(2.0 / softcap * scale * score) + 1.0))

    def step(i, carry):
        out, best, total = carry
        start = begin + i * KEYS
        at = pl.ds(start, KEYS)
        value = [value_ref[at, part] for part in halves]
        key = [key_ref[at, part].astype(jnp.float32) for part in halves]
        # What counts is the distance: keys turn by less than a step, the query by the rest.
        cosine, sine = cosine_ref[pl.ds(0, KEYS), :], sine_ref[pl.ds(0, KEYS), :]
        key = (key[0] * cosine - key[1] * sine, key[1] * cosine + key[0] * sine)
        query = turned(jnp.maximum(last - start, 0))
        score = sum(
            dot(x.astype(dtype), y.astype(dtype).T) for x, y in zip(query, key, strict=True)
        )
        place = start + jax.lax.broadcasted_iota(jnp.int32, (HEADS, KEYS), 1)
        score = jnp.where((place >= first) & (place <= last), cap(score), NOTHING)
        new = jnp.maximum(best, jnp.max(score, axis=1))
        weight = jnp.where(score > NOTHING, jnp.exp(score - new[:, None]), 0.0)
        fade = jnp.exp(best - new)
        weights = weight.astype(dtype)
        out = tuple(x * fade[:, None] + dot(weights, y) for x, y in zip(out, value, strict=True))
        return out, new, total * fade + jnp.sum(weight, axis=1)

    with_sink = (sees_sink > 0) & (program == 0)
    rotated = turned(last + 1)
    score = sum(
        jnp.sum(x.astype(dtype).astype(jnp.float32) * y[...].astype(jnp.float32)[None], axis=1)
        for x, y in zip(rotated, (sink_key_ref.at[part] for part in halves), strict=True)
    )
    best = jnp.where(with_sink, cap(score), NOTHING)
    total = jnp.where(with_sink, jnp.ones_like(best), 0.0)
    out = tuple(total[:, None] * sink_value_ref[part].astype(jnp.float32)[None] for part in halves)
    low = jnp.clip(first // KEYS - program * steps_each, 0, steps_each)
    high = jnp.clip(last // KEYS + 1 - program * steps_each, 0, steps_each)
    out, best, total = jax.lax.fori_loop(low, high, step, (out, best, total))
    for x, part in zip(out, halves, strict=True):
        out_ref[:, part] = x
    best_ref[...] = best
    total_ref[...] = total


def _join(
    out: Float[Array, "B K P HEADS C"],
    best: Float[Array, "B K P HEADS"],
    total: Float[Array, "B K P HEADS"],
    *,
    programs: int,
    like: Float[Array, "B H C"],
    interpret: bool,
) -> Float[Array, "B H C"]:
    """The softmax over all keys from the partial ones of P programs, of which the first are there."""
    *_, padded, _, dim = out.shape
    group = like.shape[1] // out.shape[1]

    def kernel(out_ref, best_ref, total_ref, joined_ref):
        there = jax.lax.broadcasted_iota(jnp.int32, (padded,), 0) < programs
        best = jnp.where(there, best_ref[...], NOTHING)
        weight = jnp.where(there, jnp.exp(best - jnp.max(best)), 0.0)
        total = jnp.sum(jnp.where(there, total_ref[...] * weight, 0.0))
        joined = jnp.sum(jnp.where(there[:, None], out_ref[...] * weight[:, None], 0.0), axis=0)
        joined_ref[...] = (joined / total).astype(joined_ref.dtype)

    number = pl.BlockSpec((None, None, padded, None), lambda b, k, g: (b, k, 0, g))
    return pl.pallas_call(
        kernel,
        grid=(out.shape[0], out.shape[1], group),
        in_specs=[
            pl.BlockSpec((None, None, padded, None, dim), lambda b, k, g: (b, k, 0, g, 0)),
            number,
            number,
        ],
        out_specs=pl.BlockSpec((None, None, dim), lambda b, k, g: (b, k * group + g, 0)),
        out_shape=jax.ShapeDtypeStruct(like.shape, like.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=2),
        name="join",
        interpret=interpret,
    )(out, best, total)


@functools.partial(jax.jit, static_argnames=("eps", "interpret"))
def add_normalized_read(
    q: Float[Array, "B 1 H C"],
    attended: Float[Array, "B 1 H C"],
    memory: Float[Array, "B K C C"],
    gate: Float[Array, " H"],
    *,
    eps: float = 1e-6,
    interpret: bool = False,
) -> Float[Array, "B 1 H C"]:
    """attended + gate * rms_norm(l2_normalize(q) M); float32 inside."""

    def mix(q, found, attended, gate):
        found *= jax.lax.rsqrt(jnp.sum(q * q) + eps)
        found *= jax.lax.rsqrt(jnp.sum(found * found) / found.size + eps)
        return attended + gate * found

    return _read(lambda q: q, mix, q, attended, memory, None, gate, interpret)


@functools.partial(jax.jit, static_argnames=("interpret",))
def mix_linear_read(
    q: Float[Array, "B 1 H C"],
    attended: Float[Array, "B 1 H C"],
    memory: Float[Array, "B K C C"],
    total: Float[Array, "B K C"],
    weight: Float[Array, " H"],
    *,
    interpret: bool = False,
) -> Float[Array, "B 1 H C"]:
    """weight * phi(q) M / phi(q) z + (1 - weight) * attended, with phi = ELU + 1; 0 is read while z is."""

    def phi(q):
        return jnp.where(q > 0.0, q + 1.0, jnp.exp(jnp.minimum(q, 0.0)))

    def mix(q, found, attended, weight, z):
        total = jnp.sum(phi(q) * z)
        found *= jnp.where(total == 0.0, 0.0, 1.0 / jnp.where(total == 0.0, 1.0, total))
        return weight * found + (1.0 - weight) * attended

    return _read(phi, mix, q, attended, memory, total, weight, interpret)


def _read(features, mix, q, attended, memory, total, gate, interpret):
    (batch, _, heads, dim), kv_heads = q.shape, memory.shape[1]
    group = heads // kv_heads

    def kernel(q_ref, attended_ref, memory_ref, gate_ref, *refs):
        *total_ref, out_ref = refs

        def step(i, found):
            depth = pl.ds(i * DEPTH, DEPTH)
            return (
                found + features(q_ref[depth].astype(jnp.float32))[:, None] * memory_ref[depth, :]
            )

        found = jax.lax.fori_loop(0, dim // DEPTH, step, jnp.zeros((DEPTH, dim), jnp.float32))
        q, attended = (ref[...].astype(jnp.float32) for ref in (q_ref, attended_ref))
        rest = [ref[...] for ref in total_ref]
        mixed = mix(q, jnp.sum(found, axis=0), attended, gate_ref[0], *rest)
        out_ref[...] = mixed.astype(out_ref.dtype)

    here = pl.BlockSpec((None, None, None, dim), lambda b, h: (b, 0, h, 0))
    matrix = pl.BlockSpec((None, None, dim, dim), lambda b, h: (b, h // group, 0, 0))
    vector = pl.BlockSpec((None, None, dim), lambda b, h: (b, h // group, 0))
    operands = [
        (q, here),
        (attended, here),
        (memory, matrix),
        (gate, pl.BlockSpec((1,), lambda b, h: (h,))),
    ]
    operands += [(total, vector)] if total is not None else []
    return pl.pallas_call(
        kernel,
        grid=(batch, heads),
        in_specs=[spec for _, spec in operands],
        out_specs=here,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=2),
        name="read_one",
        interpret=interpret,
    )(*[operand for operand, _ in operands])
