"""Rotary position embedding: pure functions."""

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gemma_jax.config import Rope


@functools.cache
def rope_table(rope: Rope, head_dim: int, num_positions: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines [positions, C/2] float32; the angles are exact (float64).

    RoFormer (Su et al. 2021), equation 15; linear scaling divides the position.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    frequency = (1.0 / rope.theta**exponent / rope.factor).astype(np.float32).astype(np.float64)
    angle = np.arange(num_positions)[:, None] * frequency
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


@functools.cache
def rope_rows(
    rope: Rope, head_dim: int, num_positions: int, start: int, stop: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of `rope_table`, cut here: the compiler would cut a large constant anew in every layer."""
    return tuple(table[start:stop] for table in rope_table(rope, head_dim, num_positions))


def rotate(
    x: Float[Array, "B T J C"],
    cosine: Float[Array | np.ndarray, "*b T C/2"],
    sine: Float[Array | np.ndarray, "*b T C/2"],
) -> Float[Array, "B T J C"]:
    """Rotates the pairs (x_i, x_{i + C/2}) of every head; computed in float32."""
    cosine, sine = (jnp.asarray(table)[..., None, :] for table in (cosine, sine))
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cosine - b * sine, b * cosine + a * sine], axis=-1).astype(x.dtype)
