"""Reading a memory of whole tokens and mixing what was found with local attention, for Hopper GPUs.

Attention over the slots, with a logit more that stands for local attention: no logit or weight is ever
in device memory, neither in the forward pass nor in the backward one, which computes them again
(FlashAttention-2, Dao 2023). bfloat16 with float32 sums. Triton (Pallas).

Kernels see the queries of a KV head side by side, Q = T G of them. Their logits are in powers of two.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

LOG2E = math.log2(math.e)
SMALL_DIM, LARGE_DIM = 128, 256  # the largest head dims that the tiles below are for


class Tile(NamedTuple):
    queries: int
    slots: int
    warps: int
    stages: int  # steps whose slots or queries are in flight


# As large as registers (255 a thread) and shared memory (227 KiB) allow without spilling, for head dims
# up to SMALL_DIM and LARGE_DIM; where there is room, so small that a multiprocessor holds two programs.
FIND = Tile(128, 64, 8, 3), Tile(128, 64, 8, 2)
QUERY_SLOPES = Tile(64, 64, 4, 2), Tile(128, 32, 8, 2)
SLOT_SLOPES = Tile(32, 64, 4, 2), Tile(32, 64, 8, 2)
ALL_SLOPES = Tile(128, 64, 8, 2)  # for small head dims alone

dot = functools.partial(jnp.dot, preferred_element_type=jnp.float32)


def takes(tokens: int, group: int, head_dim: int, slots: int) -> bool:
    """Whether the kernels divide these shapes evenly."""
    queries = tokens * group
    evenly = (queries == 64 or queries % 128 == 0) and slots % 64 == 0
    return evenly and head_dim in (64, SMALL_DIM, LARGE_DIM)


@functools.partial(jax.jit, static_argnames=("scale", "interpret"))
def attend(
    q: Float[Array, "B T H C"],
    key: Float[Array, "B K N C"],
    value: Float[Array, "B K N C"],
    bias: Float[Array, "B K N"],
    local: Float[Array, "B T H"],
    attended: Float[Array, "B T H C"],
    gate: Float[Array, " H"],
    *,
    scale: float,
    interpret: bool = False,
) -> Float[Array, "B T H C"]:
    """attended + gate * (found - share * attended), of which found = sum_n w_n v_n, share = sum_n w_n.

    The w_n are those of the slots in softmax([scale q k_n + bias_n, local]). Query head h belongs to KV
    head h // (H / K). N is the number of slots. Can be differentiated (once, in reverse).

    Args:
        q, key: rotated, bfloat16; `value` and `attended` are bfloat16 too.
        bias: added to the logits of a slot, float32; -1e4 makes its weight 0.
        local: the logit that stands for local attention, float32.
        gate: float32.
        scale: of the products q k.
    """
    return _attend(q, key, value, bias, local, attended, gate, scale, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def _attend(q, key, value, bias, local, attended, gate, scale, interpret):
    return _attend_forward(q, key, value, bias, local, attended, gate, scale, interpret)[0]


def _attend_forward(q, key, value, bias, local, attended, gate, scale, interpret):
    kv_heads = key.shape[1]
    found, share, log_total = _find(
        _by_kv_head(q, kv_heads), key, value, bias, _by_kv_head(local, kv_heads), scale, interpret
    )
    found, share = (_by_token(x, q.shape[1]) for x in (found, share))
    kept = (q, key, value, bias, attended, gate, found, share, log_total)
    return _mix(attended, found, share, gate), kept


def _attend_backward(scale, interpret, kept, slope):
    q, key, value, bias, attended, gate, found, share, log_total = kept
    kv_heads = key.shape[1]
    mixed = jax.vjp(_mix, attended, found, share, gate)[1]
    attended_slope, found_slope, share_slope, gate_slope = mixed(slope)
    mean = jnp.sum(found_slope.astype(jnp.float32) * found.astype(jnp.float32), axis=-1)
    mean += share_slope * share  # of the weights' slopes, local attention's being 0
    shift = share_slope - mean
    q_slope, key_slope, value_slope, bias_slope = _find_backward(
        *(_by_kv_head(x, kv_heads) for x in (q, found_slope)),
        *(key, value, bias, log_total),
        *(_by_kv_head(shift, kv_heads), scale, interpret),
    )
    q_slope, local_slope = _by_token(q_slope, q.shape[1]), (share - 1.0) * mean
    return q_slope, key_slope, value_slope, bias_slope, local_slope, attended_slope, gate_slope


_attend.defvjp(_attend_forward, _attend_backward)


def _mix(attended, found, share, gate):
    own = attended.astype(jnp.float32)
    change = found.astype(jnp.float32) - share[..., None] * own
    return (own + gate[:, None] * change).astype(attended.dtype)


def _by_kv_head(x: Float[Array, "B T H *c"], kv_heads: int) -> Float[Array, "B Q K *c"]:
    """The same in memory where there is but one KV head, or one query head for each."""
    batch, tokens, heads, *rest = x.shape
    x = x.reshape(batch, tokens, kv_heads, heads // kv_heads, *rest).swapaxes(2, 3)
    return x.reshape(batch, -1, kv_heads, *rest)


def _by_token(x: Float[Array, "B Q K *c"], tokens: int) -> Float[Array, "B T H *c"]:
    batch, _, kv_heads, *rest = x.shape
    x = x.reshape(batch, tokens, -1, kv_heads, *rest).swapaxes(2, 3)
    return x.reshape(batch, tokens, -1, *rest)


def _find(q, key, value, bias, local, scale, interpret):
    """What is found [B Q K C], the slots' share and log2 of the sum of all weights [B Q K]."""
    tile = FIND[q.shape[3] > SMALL_DIM]
    size = min(tile.queries, q.shape[1])
    of_queries, of_slots = _specs(size, None)
    vector = jax.ShapeDtypeStruct(local.shape, jnp.float32)
    operands = [(q, of_queries), *((x, of_slots) for x in (key, value, bias)), (local, of_queries)]
    results = [(x, of_queries) for x in (q, vector, vector)]
    kernel = functools.partial(_find_kernel, step_slots=tile.slots, scale=scale)
    return _call(kernel, q.shape[1] // size, operands, results, tile, interpret)


def _find_backward(q, slope, key, value, bias, log_total, shift, scale, interpret):
    """The slopes of q, key, value and bias; `slope` is that of what was found.

    A weight's slope is slope v_n plus the share's slope; `shift` is the latter less the mean of all.
    """
    (_, queries, _, dim), slots = q.shape, key.shape[2]
    large = dim > SMALL_DIM

    def call(kernel, programs, specs, results, tile, **step):
        operands = [(x, specs[0]) for x in (q, slope, log_total, shift)]
        operands += [(x, specs[1]) for x in (key, value, bias)]
        kernel = functools.partial(kernel, scale=scale, **step)
        return _call(kernel, programs, operands, results, tile, interpret)

    if queries <= ALL_SLOPES.queries and not large:  # one program sees all of a KV head
        tile = ALL_SLOPES
        specs = of_queries, of_slots = _specs(None, None)
        results = [(q, of_queries), *((x, of_slots) for x in (key, value, bias))]
        return call(_all_slopes_kernel, 1, specs, results, tile, step_slots=tile.slots)
    tile = QUERY_SLOPES[large]
    size = min(tile.queries, queries)
    specs = _specs(size, None)
    results, step = [(q, specs[0])], {"step_slots": tile.slots}
    (q_slope,) = call(_query_slopes_kernel, queries // size, specs, results, tile, **step)
    tile = SLOT_SLOPES[large]
    specs = _specs(None, tile.slots)
    results, step = [(x, specs[1]) for x in (key, value, bias)], {"step_queries": tile.queries}
    return q_slope, *call(_slot_slopes_kernel, slots // tile.slots, specs, results, tile, **step)


def _specs(queries, slots):
    """Blocks of so many queries and slots: one that the grid's first axis counts, or all of them."""

    def spec(axis, size, x):
        shape = [None, None, None, *x.shape[3:]]
        shape[axis] = size or x.shape[axis]

        def index(i, k, b):
            place = [b, k, k, *(0 for _ in x.shape[3:])]
            place[axis] = i if size else 0
            return tuple(place)

        return pl.BlockSpec(tuple(shape), index)

    return functools.partial(spec, 1, queries), functools.partial(spec, 2, slots)


def _call(kernel, programs, operands, results, tile, interpret):
    """`operands` and `results` are pairs of an array (or its shape) and what `_specs` says of it."""
    batch, kv_heads = operands[0][0].shape[0], operands[0][0].shape[2]
    return pl.pallas_call(
        kernel,
        grid=(programs, kv_heads, batch),
        in_specs=[spec(x) for x, spec in operands],
        out_specs=[spec(x) for x, spec in results],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x, _ in results],
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
    )(*[x for x, _ in operands])


def _find_kernel(
    q_ref, key_ref, value_ref, bias_ref, local_ref,
    found_ref, share_ref, log_total_ref, *, step_slots, scale
):  # fmt: skip
    q, local = q_ref[...], local_ref[...] * LOG2E

    def step(i, carry):
        found, best, total = carry
        slots = pl.ds(i * step_slots, step_slots)
        logit = dot(q, key_ref[slots, :].T) * (scale * LOG2E) + (bias_ref[slots] * LOG2E)[None, :]
        new = jnp.maximum(best, jnp.max(logit, axis=1))
        weight = jnp.exp2(logit - new[:, None])
        fade = jnp.exp2(best - new)
        found = found * fade[:, None] + dot(weight.astype(q.dtype), value_ref[slots, :])
        return found, new, total * fade + jnp.sum(weight, axis=1)

    start = jnp.zeros(q.shape, jnp.float32), local, jnp.zeros_like(local)
    found, best, total = jax.lax.fori_loop(0, key_ref.shape[0] // step_slots, step, start)
    total_with_local = total + jnp.exp2(local - best)
    found_ref[...] = (found / total_with_local[:, None]).astype(found_ref.dtype)
    share_ref[...] = total / total_with_local
    log_total_ref[...] = best + jnp.log(total_with_local) * LOG2E


def _weights_and_slopes(x, x_paired, y, y_paired, offset, shift, scale):
    """Weights [X Y], and the slopes of their logits, of queries x and slots y, or the other way round.

    `x_paired` and `y_paired` give the slopes of the weights: what was found has them, and values.
    """
    weight = jnp.exp2(dot(x, y.T) * (scale * LOG2E) + offset)
    return weight, weight * (dot(x_paired, y_paired.T) + shift)


def _all_slopes_kernel(
    q_ref, slope_ref, log_total_ref, shift_ref, key_ref, value_ref, bias_ref,
    q_slope_ref, key_slope_ref, value_slope_ref, bias_slope_ref, *, step_slots, scale
):  # fmt: skip
    q, slope, log_total, shift = q_ref[...], slope_ref[...], log_total_ref[...], shift_ref[...]
    # Tensor cores add up over queries, where threads would have to pass what they hold on.
    sixteenths = jnp.full((q.shape[0], 16), 1 / 16, q.dtype)

    def step(i, q_slope):
        slots = pl.ds(i * step_slots, step_slots)
        key, value, bias = key_ref[slots, :], value_ref[slots, :], bias_ref[slots] * LOG2E
        weight, logit_slope = _weights_and_slopes(
            q, slope, key, value, bias[None, :] - log_total[:, None], shift[:, None], scale
        )
        value_slope = dot(weight.astype(q.dtype).T, slope)
        value_slope_ref[slots, :] = value_slope.astype(value_slope_ref.dtype)
        logit_slope = logit_slope.astype(q.dtype)
        bias_slope_ref[slots] = jnp.sum(dot(logit_slope.T, sixteenths), axis=1)
        key_slope_ref[slots, :] = (scale * dot(logit_slope.T, q)).astype(key_slope_ref.dtype)
        return q_slope + dot(logit_slope, key)

    start = jnp.zeros(q.shape, jnp.float32)
    q_slope = jax.lax.fori_loop(0, key_ref.shape[0] // step_slots, step, start)
    q_slope_ref[...] = (scale * q_slope).astype(q_slope_ref.dtype)


def _query_slopes_kernel(
    q_ref, slope_ref, log_total_ref, shift_ref, key_ref, value_ref, bias_ref,
    q_slope_ref, *, step_slots, scale
):  # fmt: skip
    q, slope, log_total, shift = q_ref[...], slope_ref[...], log_total_ref[...], shift_ref[...]

    def step(i, q_slope):
        slots = pl.ds(i * step_slots, step_slots)
        key, value, bias = key_ref[slots, :], value_ref[slots, :], bias_ref[slots] * LOG2E
        _, logit_slope = _weights_and_slopes(
            q, slope, key, value, bias[None, :] - log_total[:, None], shift[:, None], scale
        )
        return q_slope + dot(logit_slope.astype(q.dtype), key)

    start = jnp.zeros(q.shape, jnp.float32)
    q_slope = jax.lax.fori_loop(0, key_ref.shape[0] // step_slots, step, start)
    q_slope_ref[...] = (scale * q_slope).astype(q_slope_ref.dtype)


def _slot_slopes_kernel(
    q_ref, slope_ref, log_total_ref, shift_ref, key_ref, value_ref, bias_ref,
    key_slope_ref, value_slope_ref, bias_slope_ref, *, step_queries, scale
):  # fmt: skip
    key, value, bias = key_ref[...], value_ref[...], bias_ref[...] * LOG2E

    def step(i, carry):
        key_slope, value_slope, bias_slope = carry
        queries = pl.ds(i * step_queries, step_queries)
        q, slope = q_ref[queries, :], slope_ref[queries, :]
        log_total, shift = log_total_ref[queries], shift_ref[queries]
        weight, logit_slope = _weights_and_slopes(
            key, value, q, slope, bias[:, None] - log_total[None, :], shift[None, :], scale
        )
        value_slope += dot(weight.astype(q.dtype), slope)
        bias_slope += jnp.sum(logit_slope, axis=1)
        return key_slope + dot(logit_slope.astype(q.dtype), q), value_slope, bias_slope

    start = jnp.zeros(key.shape, jnp.float32)
    start = start, start, jnp.zeros(bias.shape, jnp.float32)
    slopes = jax.lax.fori_loop(0, q_ref.shape[0] // step_queries, step, start)
    key_slope_ref[...] = (scale * slopes[0]).astype(key_slope_ref.dtype)
    value_slope_ref[...] = slopes[1].astype(value_slope_ref.dtype)
    bias_slope_ref[...] = slopes[2]
