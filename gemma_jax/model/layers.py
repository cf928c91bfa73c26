"""The plain parts of Gemma: declared parameters, norm, embedding, feed-forward."""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gemma_jax.model import kernels
from gemma_jax.model.weights import INIT, Weight, declare_weight, product, product_in_halves


def declare(
    module: nn.Module,
    name: str,
    axes: tuple[str, ...],
    shape: tuple[int, ...],
    dtype,
    init: Callable = INIT,
) -> Array:
    """A parameter of `module` with the logical names of its axes, declared in one place."""
    return module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.dtype(dtype))


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + scale), computed in float32 (Zhang and Sennrich 2019, as Gemma stores it)."""

    eps: float
    dtype: str
    axis: str = "embed"

    @nn.compact
    def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
        scale = declare(
            self, "scale", (self.axis,), x.shape[-1:], self.dtype, nn.initializers.zeros
        )
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (x32 * (1.0 + scale.astype(jnp.float32))).astype(x.dtype)


class Embedder(nn.Module):
    """Token embedding, and the head that turns hidden states into logits (tied or its own)."""

    vocab_size: int
    width: int
    tied: bool
    dtype: str
    quantized: bool = False

    def setup(self):
        def matrix(name: str) -> Weight:
            shape = (self.vocab_size, self.width)
            return declare_weight(self, name, ("vocab", "embed"), shape, self.dtype, self.quantized)

        self.embedding = matrix("embedding")
        self.head = self.embedding if self.tied else matrix("head")

    def encode(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        x = self.embedding.rows(tokens, self.dtype)
        scale = jnp.sqrt(jnp.float32(self.width)).astype(self.dtype)  # rounded as the reference's
        return x * scale

    def decode(self, hidden: Float[Array, "*b D"]) -> Float[Array, "*b V"]:
        return product(hidden, self.head, jnp.float32)


class FeedForward(nn.Module):
    """GeGLU with the tanh approximation of GELU (Shazeer 2020): gelu(x Wg) * (x Wu) Wd."""

    mlp_dim: int
    dtype: str
    quantized: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        width, dtype = x.shape[-1], self.dtype
        shape = (2 * self.mlp_dim, width)
        gate_up = declare_weight(self, "gate_up", ("mlp", "embed"), shape, dtype, self.quantized)
        shape = (width, self.mlp_dim)
        down = declare_weight(self, "down", ("embed", "mlp"), shape, dtype, self.quantized)
        return product(geglu(x, gate_up), down)


def geglu(x: Float[Array, "B T D"], gate_up: Weight) -> Float[Array, "B T M"]:
    """gelu(x Wg) * (x Wu) with the tanh approximation of GELU; `gate_up` is [Wg; Wu]."""
    (*tokens, width), mlp_dim = x.shape, gate_up.values.shape[0] // 2

    def plain(x: Array, gate_up: Weight) -> Array:
        gate, up = product_in_halves(x, gate_up)
        return nn.gelu(gate, approximate=True) * up

    if x.dtype != jnp.bfloat16 or not kernels.wanted():
        return plain(x, gate_up)
    from gemma_jax.model.kernels import products as kernel

    if not kernel.takes(math.prod(tokens), width, 2 * mlp_dim):
        return plain(x, gate_up)

    def fused(x: Array, gate_up: Weight) -> Array:
        out = kernel.geglu(x.reshape(-1, width), gate_up.dense(x.dtype))
        return out.reshape(*tokens, mlp_dim)

    return kernels.with_gradient_of(plain, fused)(x, gate_up)
