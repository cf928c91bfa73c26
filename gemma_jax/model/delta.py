"""The delta rule over a segment's tokens at once: M_t = M_{t-1} + g_t k_t (v_t - k_t M_{t-1})^T."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gemma_jax.model import kernels

# Tokens of one block of the chunked rule, as many as a head has dimensions in most models: with fewer,
# more maps of [head_dim, head_dim] are written, read and joined than it saves in the blocks.
BLOCK = 256
SMALL_BLOCK = 16  # rows that are substituted one after the other
EPS = 1e-6

# The GPU's default for float32 products is TF32, which has ten bits of fraction.
einsum = functools.partial(jnp.einsum, precision="highest", preferred_element_type=jnp.float32)


def matrix_einsum(subscripts: str, x: Array, y: Array, *, rounded_to=jnp.float32) -> Array:
    """`einsum` of large matrices, in and to float32: three passes of TF32 are nearly as exact and take
    less time.

    Of what is `rounded_to` bfloat16 in the end, three passes of bfloat16, which tensor cores multiply at
    twice the rate of TF32, compute at least 16 bits. The gradient is computed likewise.
    """
    precision = "highest"
    if kernels.compute_capability() >= kernels.AMPERE:
        presets, narrow = jax.lax.DotAlgorithmPreset, rounded_to == jnp.bfloat16
        precision = presets.BF16_BF16_F32_X3 if narrow else presets.TF32_TF32_F32_X3
    return jnp.einsum(subscripts, x, y, precision=precision, preferred_element_type=jnp.float32)


def l2_normalize(x: Array) -> Array:
    return x * inverse_length(x)


def inverse_length(x: Float[Array, "*b F"]) -> Float[Array, "*b 1"]:
    return jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + EPS)


def delta_map(
    key: Float[Array, "B S K F"], value: Float[Array, "B S K C"], gate: Float[Array, "B S K"]
) -> tuple[Float[Array, "B K F F"], Float[Array, "B K F C"]]:
    """What S tokens do to any memory M by M_t = M_{t-1} + g_t k_t (v_t - k_t M_{t-1})^T.

    Keys are L2-normalised first. All tokens together are affine in M: the result is (keep, add), and M
    becomes keep M + add. A gate of 0 keeps exactly.
    """
    if key.dtype == jnp.bfloat16 and kernels.wanted():
        from gemma_jax.model.kernels import delta as kernel

        if kernel.takes(key.shape[-1], value.shape[-1]):
            return kernels.with_gradient_of(_delta_map, _delta_map_by_kernel)(key, value, gate)
    return _delta_map(key, value, gate)


def _delta_map(key: Array, value: Array, gate: Array) -> tuple[Array, Array]:
    """`delta_map` by blocks: within a block the tokens' corrections solve a unit lower triangular
    system (the WY form of Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule",
    equations 10 and 11). It is solved by substitution: powers of its matrix overflow when keys are
    nearly equal. The maps of blocks are then joined in pairs. Everything is float32.
    """
    key, value = l2_normalize(key.astype(jnp.float32)), value.astype(jnp.float32)
    length = max(1 << (key.shape[1] - 1).bit_length(), SMALL_BLOCK)  # a power of two
    pad, block = length - key.shape[1], min(length, BLOCK)

    def blocks(x: Array) -> Array:  # [B, S, K, ...] -> [blocks, B, K, block, ...]
        x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
        x = x.reshape(x.shape[0], -1, block, *x.shape[2:])
        return jnp.moveaxis(jnp.moveaxis(x, 3, 1), 2, 0)

    key, value, gate = blocks(key), blocks(value), blocks(gate)[..., None]
    overlap = jnp.tril(gate * matrix_einsum("nBKsF,nBKtF->nBKst", key, key), -1)
    right = jnp.concatenate([gate * value, gate * key], axis=-1)
    solved = solve(overlap, right)
    new_value, new_key = jnp.split(solved, [value.shape[-1]], axis=-1)
    keep = jnp.eye(key.shape[-1]) - matrix_einsum("nBKsF,nBKsG->nBKFG", key, new_key)
    add = matrix_einsum("nBKsF,nBKsC->nBKFC", key, new_value)
    while keep.shape[0] > 1:  # the later map after the earlier one
        add = matrix_einsum("nBKFG,nBKGC->nBKFC", keep[1::2], add[0::2]) + add[1::2]
        keep = matrix_einsum("nBKFG,nBKGH->nBKFH", keep[1::2], keep[0::2])
    return keep[0], add[0]


@jax.custom_vjp
def solve(lower: Float[Array, "*b N N"], right: Float[Array, "*b N J"]) -> Float[Array, "*b N J"]:
    """X of (I + lower) X = right, with `lower` strictly lower triangular; N is SMALL_BLOCK times a
    power of two.

    Not by `triangular_solve`: cuBLAS's takes longer, and LAPACK's shares out a batch to the threads
    that run the program and waits for them, for ever when all of them are at solvers of their own.
    """
    return matrix_einsum("...NM,...MJ->...NJ", _inverse(lower), right)


def _solve_forward(lower: Array, right: Array) -> tuple[Array, tuple[Array, Array]]:
    inverse = _inverse(lower)
    solved = matrix_einsum("...NM,...MJ->...NJ", inverse, right)
    return solved, (inverse, solved)


def _solve_backward(kept: tuple[Array, Array], slope: Array) -> tuple[Array, Array]:
    inverse, solved = kept
    of_right = matrix_einsum("...NM,...NJ->...MJ", inverse, slope)
    return -jnp.tril(matrix_einsum("...NJ,...MJ->...NM", of_right, solved), -1), of_right


solve.defvjp(_solve_forward, _solve_backward)


def _inverse(lower: Float[Array, "*b N N"]) -> Float[Array, "*b N N"]:
    """(I + lower)^-1: of small blocks on the diagonal by substitution, then of pairs of them."""
    size, done = lower.shape[-1], SMALL_BLOCK
    found = _substitute(_on_diagonal(lower, done))
    while done < size:  # the inverse of [[A, 0], [B, C]] has -C^-1 B A^-1 in the place of B
        first, last = found[..., 0::2, :, :], found[..., 1::2, :, :]
        between = _on_diagonal(lower, 2 * done)[..., done:, :done]
        between = -matrix_einsum(
            "...NM,...MJ->...NJ", matrix_einsum("...NM,...MJ->...NJ", last, between), first
        )
        found = jnp.block([[first, jnp.zeros_like(first)], [between, last]])
        done *= 2
    return found[..., 0, :, :]


def _on_diagonal(x: Float[Array, "*b N N"], size: int) -> Float[Array, "*b n size size"]:
    """The blocks on the diagonal."""
    cut = x.reshape(*x.shape[:-2], -1, size, x.shape[-1] // size, size)
    return jnp.moveaxis(jnp.diagonal(cut, axis1=-4, axis2=-2), -1, -3)


def _substitute(lower: Float[Array, "*b N N"]) -> Float[Array, "*b N N"]:
    """(I + lower)^-1, row by row."""
    size = lower.shape[-1]

    def next_row(row: Array, found: Array) -> Array:
        factors = jax.lax.dynamic_index_in_dim(lower, row, axis=-2, keepdims=False)
        return found.at[..., row, :].add(-einsum("...M,...MJ->...J", factors, found))

    return jax.lax.fori_loop(1, size, next_row, jnp.broadcast_to(jnp.eye(size), lower.shape))


def _delta_map_by_kernel(key: Array, value: Array, gate: Array) -> tuple[Array, Array]:
    from gemma_jax.model.kernels import delta as kernel

    def by_head(x: Array) -> Array:  # [B, S, K, ...] -> [B*K, S, ...]
        x = jnp.moveaxis(x, 2, 1)
        return x.reshape(-1, *x.shape[2:])

    batch, kv_heads = key.shape[0], key.shape[2]
    length = jnp.sqrt(jnp.sum(jnp.square(key.astype(jnp.float32)), axis=-1) + EPS)
    maps = kernel.delta_map(*map(by_head, (key, length, value, gate)))
    return tuple(x.reshape(batch, kv_heads, *x.shape[1:]) for x in maps)
