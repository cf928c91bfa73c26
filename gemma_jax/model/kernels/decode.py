"""Attention and memory of one new token a row, for Hopper GPUs: kernels for decoding.

A single token leaves most of a GPU idle unless its work is divided. Every program of the first kernel
takes a few keys, which it rotates as it reads them, or a few rows of memory; the second joins the
partial softmaxes (as Flash-Decoding does), sums what was found in memory, and mixes the two. Triton
(Pallas).
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int

from gemma_jax.model.kernels.lookup import Lookup

KEYS = 32  # of one step of a program
PROGRAMS = 256  # two per multiprocessor
HEADS = 16  # the fewest rows that tensor cores multiply; a group of fewer is repeated
ALONE = 132  # programs that have a multiprocessor each, and so may be wider
DEPTH = 32  # rows of memory of a program
NOTHING = -1e30  # score of what is not seen

dot = functools.partial(jnp.dot, preferred_element_type=jnp.float32)


def takes(window: int, group: int, head_dim: int) -> bool:
    """Whether the kernels divide these shapes evenly."""
    power_of_two = head_dim & (head_dim - 1) == 0
    return window % KEYS == 0 and group <= HEADS and power_of_two and head_dim >= 2 * DEPTH


@functools.partial(jax.jit, static_argnames=("scale", "softcap", "interpret"))
def attend(
    q: Float[Array, "B H C"],
    keys: Float[Array, "B L K C"],
    values: Float[Array, "B L K C"],
    sink: tuple[Float[Array, "B 1 K C"], Float[Array, "B 1 K C"]],
    seen: Int[Array, "B 3"],
    cosine: Float[Array, "L1 C/2"],
    sine: Float[Array, "L1 C/2"],
    lookup: Lookup | None = None,
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
        lookup: a memory to read for the same queries.
    """
    (batch, window, kv_heads, dim), heads = keys.shape, q.shape[1]
    group, steps = heads // kv_heads, window // KEYS
    programs = pl.cdiv(steps, 1 << max(batch * kv_heads * steps // PROGRAMS, 1).bit_length() - 1)
    readers = dim // DEPTH if lookup else 0
    row = pl.BlockSpec((None, group, dim), lambda b, k, i: (b, k, 0))
    stream = pl.BlockSpec((None, window, None, dim), lambda b, k, i: (b, 0, k, 0))
    first = pl.BlockSpec((None, None, None, dim), lambda b, k, i: (b, 0, k, 0))
    table = pl.BlockSpec(cosine.shape, lambda b, k, i: (0, 0))
    matrix = pl.BlockSpec((None, None, dim, dim), lambda b, k, i: (b, k, 0, 0))
    operands = [(q, row), (keys, stream), (values, stream), (sink[0], first), (sink[1], first)]
    operands += [(seen, pl.BlockSpec((None, 3), lambda b, k, i: (b, 0)))]
    operands += [(cosine, table), (sine, table)]
    operands += [(lookup.matrix, matrix)] if lookup else []

    def kernel(*refs):
        inputs, outputs, program = refs[: len(operands)], refs[len(operands) :], pl.program_id(2)

        @pl.when(program < programs)
        def attention():
            part = functools.partial(_attend, group=group, program=program, programs=programs)
            part(*inputs[:8], *outputs[:3], scale=scale, softcap=softcap)

        if lookup:

            @pl.when(program >= programs)
            def memory():
                reader = program - programs
                depth, rows = pl.ds(reader * DEPTH, DEPTH), _rows(group)
                features = lookup.features(inputs[0][rows, depth].astype(jnp.float32))
                found = dot(features, inputs[8][depth, :], precision="highest")
                plgpu.store(outputs[3].at[reader], found, mask=_once(group, found))

    def of_head(shape: tuple[int, ...]) -> pl.BlockSpec:
        zeros = (0,) * len(shape)
        return pl.BlockSpec((None, None, *shape), lambda b, k, i: (b, k, *zeros))

    # `_join` needs a power of two.
    shapes = [(1 << (programs - 1).bit_length(), HEADS, dim)]
    shapes += [shapes[0][:2]] * 2 + [(readers, HEADS, dim)] * (readers > 0)
    found = pl.pallas_call(
        kernel,
        grid=(batch, kv_heads, programs + readers),
        in_specs=[spec for _, spec in operands],
        out_specs=[of_head(shape) for shape in shapes],
        out_shape=[
            jax.ShapeDtypeStruct((batch, kv_heads, *shape), jnp.float32) for shape in shapes
        ],
        compiler_params=plgpu.CompilerParams(
            num_warps=4 if batch * kv_heads * programs > ALONE else 8, num_stages=3
        ),
        name="attend_one",
        interpret=interpret,
    )(*[operand for operand, _ in operands])
    return _join(*found, programs=programs, q=q, lookup=lookup, interpret=interpret)


def _rows(group: int) -> Int[Array, " HEADS"]:
    """The query heads of a group, repeated."""
    return jax.lax.broadcasted_iota(jnp.int32, (HEADS,), 0) % group


def _once(group: int, like: Array) -> Bool[Array, "HEADS ..."]:
    """Which rows of a result are of heads that are not repeated: the others need not be stored."""
    return jax.lax.broadcasted_iota(jnp.int32, like.shape, 0) < group


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
    program,
    programs,
    scale,
    softcap,
):
    half, dtype, row = q_ref.shape[1] // 2, q_ref.dtype, _rows(group)
    first, last, sees_sink = seen_ref[0], seen_ref[1], seen_ref[2]
    begin, end = first // KEYS, last // KEYS + 1  # steps with keys that are seen
    each = pl.cdiv(end - begin, programs)
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
        start = i * KEYS
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
    begin += program * each
    end = jnp.minimum(begin + each, end)
    out, best, total = jax.lax.fori_loop(begin, end, step, (out, best, total))
    for x, part in zip(out, halves, strict=True):
        plgpu.store(out_ref.at[program, :, part], x, mask=_once(group, x))
    plgpu.store(best_ref.at[program], best, mask=_once(group, best))
    plgpu.store(total_ref.at[program], total, mask=_once(group, total))


def _join(
    out: Float[Array, "B K P HEADS C"],
    best: Float[Array, "B K P HEADS"],
    total: Float[Array, "B K P HEADS"],
    found: Float[Array, "B K R HEADS C"] | None = None,
    *,
    programs: int,
    q: Float[Array, "B H C"],
    lookup: Lookup | None,
    interpret: bool,
) -> Float[Array, "B H C"]:
    """The softmax over all keys from the partial ones of P programs, of which the first are there.

    With `lookup` also what was found in memory, in R parts, mixed in.
    """
    (batch, kv_heads, padded, _, dim), heads = out.shape, q.shape[1]
    group = heads // kv_heads

    def kernel(*refs):
        out_ref, best_ref, total_ref, *rest, joined_ref = refs
        there = jax.lax.broadcasted_iota(jnp.int32, (padded,), 0) < programs
        best = jnp.where(there, best_ref[...], NOTHING)
        weight = jnp.where(there, jnp.exp(best - jnp.max(best)), 0.0)
        total = jnp.sum(jnp.where(there, total_ref[...] * weight, 0.0))
        joined = jnp.sum(jnp.where(there[:, None], out_ref[...] * weight[:, None], 0.0), axis=0)
        joined = joined / total
        if lookup:
            q_ref, gate_ref, found_ref, *memory_total = rest
            found = jnp.sum(found_ref[...], axis=0)
            memory_total = memory_total[0][...] if memory_total else None
            query = q_ref[...].astype(jnp.float32)
            joined = joined.astype(joined_ref.dtype).astype(jnp.float32)
            joined = lookup.mix(query, found, joined, gate_ref[0], memory_total)
        joined_ref[...] = joined.astype(joined_ref.dtype)

    def parts(x: Array) -> tuple[Array, pl.BlockSpec]:
        rest = x.shape[4:]
        block = (None, None, x.shape[2], None, *rest)
        return x, pl.BlockSpec(block, lambda b, k, g: (b, k, 0, g, *(0 for _ in rest)))

    here = pl.BlockSpec((None, None, dim), lambda b, k, g: (b, k * group + g, 0))
    operands = [parts(out), parts(best), parts(total)]
    if lookup:
        gate = pl.BlockSpec((1,), lambda b, k, g: (k * group + g,))
        operands += [(q, here), (lookup.gate, gate), parts(found)]
    if lookup and lookup.total is not None:
        vector = pl.BlockSpec((None, None, dim), lambda b, k, g: (b, k, 0))
        operands += [(lookup.total, vector)]
    return pl.pallas_call(
        kernel,
        grid=(batch, kv_heads, group),
        in_specs=[spec for _, spec in operands],
        out_specs=here,
        out_shape=jax.ShapeDtypeStruct((batch, heads, dim), q.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=2),
        name="join",
        interpret=interpret,
    )(*[operand for operand, _ in operands])
