"""What a memory rule tells the kernels, so that they read its memory."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float


@struct.dataclass
class Lookup:
    """A memory that the kernels can read, with f = phi(q) M or q M.

    Without `total` what is mixed in is attended + gate * rms_norm(f / |q|), with it
    gate * f / (phi(q) total) + (1 - gate) * attended, where phi = ELU + 1 and 0 / 0 = 0.
    """

    matrix: Float[Array, "*b K C C"]
    gate: Float[Array, " H"]
    total: Float[Array, "*b K C"] | None = None
    eps: float = struct.field(pytree_node=False, default=1e-6)

    def features(self, q: Array) -> Array:
        if self.total is None:
            return q
        return jnp.where(q > 0.0, q + 1.0, jnp.exp(jnp.minimum(q, 0.0)))

    def mix(
        self,
        q: Array,
        found: Array,
        attended: Array,
        gate: Array,
        total: Array | None,
        spread: Callable[[Array], Array] = lambda number: number,
    ) -> Array:
        """Of one query head, float32: vectors [C], and `total` [C] if there is one.

        Or of several, [H, C], if `spread` repeats their numbers [H], as `gate` is then, along columns.
        """
        if self.total is None:
            found *= spread(jax.lax.rsqrt(jnp.sum(q * q, axis=-1) + self.eps))
            size = jnp.sum(found * found, axis=-1) / found.shape[-1]
            found *= spread(jax.lax.rsqrt(size + self.eps))
            return attended + spread(gate) * found
        total = jnp.sum(self.features(q) * total, axis=-1)
        found *= spread(jnp.where(total == 0.0, 0.0, 1.0 / jnp.where(total == 0.0, 1.0, total)))
        return spread(gate) * found + spread(1.0 - gate) * attended
