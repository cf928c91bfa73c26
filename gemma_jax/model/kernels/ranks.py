"""How many tokens score higher than each, as segment after segment joins them, for Hopper GPUs.

A program sees some tokens of a row and goes through all of the row once. Triton (Pallas).
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

TILE = 64  # tokens of a program, and those that they are compared with at once


def takes(length: int) -> bool:
    """Whether the kernel divides segments of that length evenly."""
    return length % TILE == 0


@functools.partial(jax.jit, static_argnames=("first", "length", "interpret"))
def count_ahead(
    score: Float[Array, "B K M"], *, first: int, length: int, interpret: bool = False
) -> Int[Array, "segments+1 B K M"]:
    """By token: how many of the first `first` are ahead of it, and how many once each segment has joined.

    A token is ahead of another if its score is higher, or as high and the token later.

    Args:
        score: float32, of `first` tokens and those of segments of `length`.
    """
    more = -first % TILE  # tokens that are behind all others
    score = jnp.pad(score, ((0, 0), (0, 0), (more, 0)), constant_values=-jnp.inf)
    batch, heads, tokens = score.shape
    first, rows = first + more, batch * heads
    segments = (tokens - first) // length
    kernel = functools.partial(_count_ahead, first=first, length=length, segments=segments)
    found = pl.pallas_call(
        kernel,
        grid=(tokens // TILE, rows),
        in_specs=[pl.BlockSpec((None, tokens), lambda i, row: (row, 0))],
        out_specs=pl.BlockSpec((segments + 1, None, TILE), lambda i, row: (0, row, i)),
        out_shape=jax.ShapeDtypeStruct((segments + 1, rows, tokens), jnp.int32),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
    )(score.reshape(rows, tokens))
    return found.reshape(-1, *score.shape)[..., more:]


def _count_ahead(score_ref, out_ref, *, first, length, segments):
    start = pl.program_id(0) * TILE
    own = score_ref[pl.ds(start, TILE)][:, None]
    number = (start + jnp.arange(TILE, dtype=jnp.int32))[:, None]

    def add(begin, tokens, total):
        def step(i, total):
            at = begin + i * TILE
            others = score_ref[pl.ds(at, TILE)][None, :]
            later = (at + jnp.arange(TILE, dtype=jnp.int32))[None, :] > number
            ahead = (others > own) | ((others == own) & later)
            return total + jnp.sum(ahead.astype(jnp.int32), axis=1)

        return jax.lax.fori_loop(0, tokens // TILE, step, total)

    total = add(0, first, jnp.zeros((TILE,), jnp.int32))
    out_ref[0, :] = total

    def segment(i, total):
        total = add(first + i * length, length, total)
        out_ref[i + 1, :] = total
        return total

    jax.lax.fori_loop(0, segments, segment, total)
