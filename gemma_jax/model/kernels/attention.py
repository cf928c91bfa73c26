"""Attention of segments over their windows, for Hopper GPUs.

All segments of a step read one stream of keys [history P | slots]: a query of segment n sees the
stream from n S on, up to itself. Nothing is cut out, masked or padded for it, and what is invisible
is not computed. The sink enters as the softmax's first term. Mosaic GPU (Pallas): one warpgroup
streams keys and values in, two rotate 64 queries each, work on them and take turns at the tensor
cores (FlashAttention-3, Shah et al. 2024). Memory is read at the end: its matrix follows the values.
"""

import functools
import inspect
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from gemma_jax.model.kernels.lookup import Lookup

QUERIES, KEYS = 64, 64  # of a warpgroup, and of one step
STAGES = 2  # steps whose keys and values are in flight
COMPUTE = 2  # warpgroups
NOTHING = -1e30  # stands for a score of minus infinity, without its arithmetic


def takes(segment_length: int, history: int, head_dim: int) -> bool:
    """Whether the kernel divides these shapes evenly."""
    return (
        segment_length % (COMPUTE * QUERIES) == 0 and history % KEYS == 0 and head_dim in (128, 256)
    )


@functools.partial(jax.jit, static_argnames=("segment_length", "scale"))
def segment_attention(
    q: Float[Array, "B T H C"],
    keys: Float[Array, "B L K C"],
    values: Float[Array, "B L K C"],
    cosine: Float[Array | np.ndarray, "T C/2"],
    sine: Float[Array | np.ndarray, "T C/2"],
    sink_keys: Float[Array, "B N K C"],
    sink_values: Float[Array, "B K C"],
    past: Int[Array, " B"],
    lookup: Lookup | None = None,
    *,
    segment_length: int,
    scale: float,
) -> Float[Array, "B T H C"]:
    """Softmax attention, and what is read from memory; bfloat16 with float32 sums.

    Args:
        q: queries of whole segments, not rotated yet.
        keys, values: the stream [history | T slots], keys rotated.
        cosine, sine: what queries are rotated by, float32.
        sink_keys: key of the sink, rotated as each segment sees it.
        sink_values: value of the sink.
        past: tokens before the slots, a multiple of 64 or more than the history: so many keys of it are
            there, and a segment that more tokens than the history precede sees the sink.
        lookup: a memory that is read too, with the matrix [B, N, K, C, C] and `total` of each segment.
            The matrix enters as the sum of two bfloat16 numbers, which keeps 16 bits of its fraction,
            far more than the result holds; so do features that are not the queries themselves.
        scale: of the scores.
    """
    batch, length, heads, dim = q.shape
    history, group = keys.shape[1] - length, heads // keys.shape[2]
    layout = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    log2e = math.log2(math.e)
    nothing = jnp.zeros((0,), jnp.float32)
    memory, gate, memory_total = nothing.astype(q.dtype), nothing, nothing
    if lookup is not None:
        high = lax.reduce_precision(lookup.matrix, exponent_bits=8, mantissa_bits=7)
        rows = [x.reshape(*x.shape[:3], -1, 1, KEYS, dim) for x in (high, lookup.matrix - high)]
        memory = jnp.concatenate(rows, axis=4).astype(q.dtype)
        gate = lookup.gate
        memory_total = nothing if lookup.total is None else lookup.total

    def kernel(
        q_ref, k_ref, v_ref, cosine_ref, sine_ref, sink_key_ref, sink_value_ref, past_ref,
        memory_ref, gate_ref, memory_total_ref, out_ref,
        q_tiles, k_tiles, v_tiles, sinks, q_full, k_full, v_full, k_empty, v_empty, turn
    ):  # fmt: skip
        row, head = lax.axis_index("row"), lax.axis_index("head")
        warpgroup = lax.axis_index("warpgroup")
        kv_head = lax.div(head, jnp.int32(group))
        tile = lax.axis_index("tile") * (COMPUTE * QUERIES)
        segment = lax.div(tile, jnp.int32(segment_length))
        begin = lax.max(segment * segment_length, history - past_ref[row])
        begin = lax.div(begin, jnp.int32(KEYS))  # in steps
        end = lax.div(history + tile + COMPUTE * QUERIES, jnp.int32(KEYS))
        steps = end - begin
        plain = steps - COMPUTE * QUERIES // KEYS  # steps of which every query sees all keys

        @pl.when(warpgroup == COMPUTE)
        def load_tiles():
            plgpu.set_max_registers(24, action="decrease")

            @pl.loop(0, steps)
            def step(at):
                slot = lax.rem(at, jnp.int32(STAGES))
                part = (row, pl.ds((begin + at) * KEYS, KEYS), kv_head)
                for ref, tiles, full, empty in (
                    (k_ref, k_tiles, k_full, k_empty),
                    (v_ref, v_tiles, v_full, v_empty),
                ):

                    @pl.when(at >= STAGES)
                    def wait(empty=empty):
                        plgpu.barrier_wait(empty.at[slot])

                    plgpu.copy_gmem_to_smem(ref.at[part], tiles.at[slot], full.at[slot])

            if lookup is not None:
                for own in range(COMPUTE):  # the queries again, as they were
                    slot = lax.rem(steps + own, jnp.int32(STAGES))
                    plgpu.barrier_wait(k_empty.at[slot])
                    part = (row, pl.ds(tile + own * QUERIES, QUERIES), head)
                    plgpu.copy_gmem_to_smem(q_ref.at[part], k_tiles.at[slot], k_full.at[slot])
                for at in range(2 * dim // KEYS):
                    slot = lax.rem(steps + at, jnp.int32(STAGES))
                    plgpu.barrier_wait(v_empty.at[slot])
                    part = (row, segment, kv_head, *divmod(at, 2))
                    plgpu.copy_gmem_to_smem(memory_ref.at[part], v_tiles.at[slot], v_full.at[slot])

        def look_up(warpgroup):
            """What is found in memory, and the share of what was attended to; `Lookup.mix` in parts."""
            slot = lax.rem(steps + warpgroup, jnp.int32(STAGES))
            queries = k_tiles.at[slot]
            plgpu.barrier_wait(k_full.at[slot])
            layout = plgpu.Layout.WGMMA
            found = plgpu.layout_cast(jnp.zeros((QUERIES, dim), jnp.float32), layout)
            number = 0.0  # |q|^2, or phi(q) total
            for at in range(0, dim, KEYS):
                columns = pl.ds(at, KEYS)
                features = lookup.features(load(queries.at[:, columns], layout).astype(jnp.float32))
                factor = features
                if lookup.total is not None:
                    ref = memory_total_ref.at[row, segment, kv_head, columns]
                    factor = load(ref, layout.reduce(0), optimized=False)
                    factor = lax.broadcast_in_dim(factor, features.shape, (1,))
                number += (features * factor).sum(axis=1)
                high = features.astype(q.dtype)
                low = (features - high.astype(jnp.float32)).astype(q.dtype)
                by_higher = [high] if lookup.total is None else [high, low]  # low is 0 of a query
                for half, parts in enumerate([by_higher, [high]]):
                    i = 2 * at // KEYS + half
                    slot = lax.rem(steps + i, jnp.int32(STAGES))
                    plgpu.barrier_wait(v_full.at[slot])
                    for part in parts:
                        found = _accumulate(found, part, v_tiles.at[slot])
                    if i + STAGES < 2 * dim // KEYS:
                        plgpu.barrier_arrive(v_empty.at[slot])

            def by_number(x):
                return lax.broadcast_in_dim(x, found.shape, (0,))

            weight = gate_ref[head]
            if lookup.total is not None:
                empty = number == 0.0
                inverse = jnp.where(empty, 0.0, weight / jnp.where(empty, 1.0, number))
                return found * by_number(inverse), 1.0 - weight
            found *= by_number(lax.rsqrt(number + lookup.eps))
            size = (found * found).sum(axis=1) / dim
            return found * by_number(weight * lax.rsqrt(size + lookup.eps)), 1.0

        @pl.when(warpgroup < COMPUTE)
        def compute():
            plgpu.set_max_registers(240, action="increase")
            q_tile = q_tiles.at[warpgroup]
            start = tile + warpgroup * QUERIES

            def take_turns():
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(turn)

            own = pl.ds(start, QUERIES)
            arrived = q_full.at[warpgroup]
            plgpu.copy_gmem_to_smem(q_ref.at[row, own, head], q_tile, arrived)
            sink_key, sink_value = sinks.at[warpgroup, 0], sinks.at[warpgroup, 1]
            plgpu.copy_gmem_to_smem(sink_key_ref.at[row, segment, kv_head], sink_key, arrived)
            plgpu.copy_gmem_to_smem(sink_value_ref.at[row, kv_head], sink_value, arrived)
            cosine, sine = (
                load(ref.at[own], plgpu.Layout.WGMMA, optimized=False)
                for ref in (cosine_ref, sine_ref)
            )
            plgpu.barrier_wait(arrived)

            by_row, by_column = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)

            def of_sink(ref, columns):
                return lax.broadcast_in_dim(load(ref, by_column), (QUERIES, columns), (1,))

            halves = [pl.ds(at, dim // 2) for at in (0, dim // 2)]
            a, b = (load(q_tile.at[:, half], plgpu.Layout.WGMMA) for half in halves)
            a, b = a.astype(jnp.float32), b.astype(jnp.float32)
            found = 0.0
            for half, rotated in zip(
                halves, (a * cosine - b * sine, b * cosine + a * sine), strict=True
            ):
                rotated = rotated.astype(q.dtype)
                q_tile[:, half] = rotated
                product = rotated.astype(jnp.float32) * of_sink(sink_key.at[half], dim // 2)
                found += product.sum(axis=1)
            plgpu.commit_smem()
            seen = past_ref[row] + segment * segment_length > history
            best = found * (scale * log2e) + jnp.where(seen, 0.0, NOTHING)
            total = plgpu.layout_cast(jnp.full((QUERIES,), 1.0, jnp.float32), by_row)
            out = of_sink(sink_value, dim)
            plgpu.barrier_wait(k_full.at[0])
            pl.when(warpgroup == 1)(take_turns)

            def step(at, carry, *, causal):
                out, best, total = carry
                slot = lax.rem(at, jnp.int32(STAGES))

                def score(result):
                    plgpu.wgmma(result, q_tile, plgpu.transpose_ref(k_tiles.at[slot], (1, 0)))
                    take_turns()
                    return result[...]

                found = pl.run_scoped(score, plgpu.ACC((QUERIES, KEYS), jnp.float32))
                plgpu.barrier_arrive(k_empty.at[slot])
                if causal:
                    shape = (QUERIES, KEYS)
                    query = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
                    key = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
                    seen = query + (history + start) >= key + (begin + at) * KEYS
                    found = jnp.where(seen, found, NOTHING)
                new = jnp.maximum(best, found.max(axis=1) * (scale * log2e))
                shrink = jnp.exp2(best - new)
                weight = jnp.exp2(
                    found * (scale * log2e) - lax.broadcast_in_dim(new, found.shape, (0,))
                )
                out = out * lax.broadcast_in_dim(shrink, out.shape, (0,))
                narrow = weight.astype(q.dtype)
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(v_full.at[slot])
                plgpu.barrier_wait(turn)
                total = total * shrink + weight.sum(axis=1)

                def meanwhile():
                    @pl.when(at + 1 < steps)
                    def wait():
                        plgpu.barrier_wait(k_full.at[lax.rem(at + 1, jnp.int32(STAGES))])

                out = _accumulate(out, narrow, v_tiles.at[slot], meanwhile)
                plgpu.barrier_arrive(v_empty.at[slot])
                return out, new, total

            carry = (out, best, total)
            carry = lax.fori_loop(0, plain, lambda at, c: step(at, c, causal=False), carry)
            carry = lax.fori_loop(plain, steps, lambda at, c: step(at, c, causal=True), carry)
            pl.when(warpgroup == 0)(take_turns)
            out, _, total = carry
            out = out * lax.broadcast_in_dim(1.0 / total, out.shape, (0,))
            q_tile[...] = out.astype(q.dtype)
            if lookup is not None:
                found, share = look_up(warpgroup)
                for half in halves:
                    some = share * load(q_tile.at[:, half], plgpu.Layout.WGMMA).astype(jnp.float32)
                    some += found[:, half.start : half.start + half.size]
                    q_tile[:, half] = some.astype(q.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_tile, out_ref.at[row, own, head])
            plgpu.wait_smem_to_gmem(0)

    def body(*refs):
        def tiles_of(*shape):
            return plgpu.SMEM((*shape, dim), q.dtype, transforms=layout)

        pl.run_scoped(
            lambda *scratch: kernel(*refs, *scratch),
            tiles_of(COMPUTE, QUERIES),
            tiles_of(STAGES, KEYS),
            tiles_of(STAGES, KEYS),
            plgpu.SMEM((COMPUTE, 2, dim), jnp.float32),
            plgpu.Barrier(num_arrivals=3, num_barriers=COMPUTE),
            *[plgpu.Barrier(num_barriers=STAGES)] * 2,
            *[plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=STAGES)] * 2,
            plgpu.Barrier(num_arrivals=COMPUTE),
            collective_axes="warpgroup",
        )

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(heads, length // (COMPUTE * QUERIES), batch),
        grid_names=("head", "tile", "row"),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(
        q,
        keys,
        values,
        jnp.asarray(cosine),
        jnp.asarray(sine),
        sink_keys.astype(jnp.float32),
        sink_values.astype(jnp.float32),
        past,
        memory,
        gate,
        memory_total,
    )


def _accumulate(out, weight, values, meanwhile=lambda: None):
    """out + weight values, with `weight` in registers."""

    def add(accumulator):
        plgpu.wgmma(accumulator, weight, values)
        meanwhile()

    return pl.run_state(add)(plgpu.ACC.init(out))


def load(ref: Any, layout: Any, **options: Any) -> Any:
    """An array in registers, laid out as asked."""
    index = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()  # before jax 0.12
    return plgpu.load(ref, *index, layout=layout, **options)
