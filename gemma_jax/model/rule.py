"""What a memory rule is: how a layer remembers the tokens that local attention no longer sees.

A rule is one class of pure functions: `params`, `features`, `init`, `read`, `prepare`, `write`. Memory
exists per layer and per KV head; the query heads of a group read the same one. Sums are kept in float32,
tokens as they are. Keys and queries enter memory after QK-norm and before rotary embedding. Each token
is written once, with its whole segment, when local attention stops seeing that segment.
"""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from gemma_jax.config import GemmaConfig
from gemma_jax.model.kernels.lookup import Lookup

Memory = dict[str, Array]
Features = dict[str, Array]
Params = dict[str, Array]

UNROLL = 8  # segments


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter of a rule: float32, one per layer that has memory."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]  # logical names of the axes
    init: Callable = nn.initializers.zeros


@struct.dataclass
class WriteGate:
    """A write gate per token and KV head: x W + b through a sigmoid or, if `hard`, a piecewise linear one."""

    kernel: Float[Array, "D K"]
    bias: Float[Array, " K"]
    hard: bool = struct.field(pytree_node=False)

    def opened(self, logit: Array) -> Array:
        if self.hard:  # exactly 0 and 1 at the ends
            return jnp.clip(logit / 4.0 + 0.5, 0.0, 1.0)
        return jax.nn.sigmoid(logit)


@dataclasses.dataclass(frozen=True)
class MemoryRule:
    """What every rule provides; this one remembers nothing (rule `off`).

    Axis letters are those of `gemma_jax`. `p` holds the arrays of `params`, of one layer.
    """

    config: GemmaConfig

    def params(self) -> dict[str, Parameter]:
        """The rule's own parameters."""
        return {}

    def features(
        self,
        p: Params,
        x: Float[Array, "B T D"],
        q: Float[Array, "B T H C"],
        k: Float[Array, "B T K C"],
        v: Float[Array, "B T K C"],
    ) -> Features:
        """What must be known of each token when it is written, beside its key and value.

        Returns arrays [B, T, ...]. They are buffered in State until the segment is written.
        """
        return {}

    def write_gate(self, p: Params) -> WriteGate | None:
        """`features` as a gate alone, called `write`, if that is all; else None."""
        return None

    def init(self, batch_size: int) -> Memory:
        """The memory of a text of which nothing was written yet: arrays [B, ...]."""
        return {}

    def read(
        self,
        p: Params,
        memory: Memory,
        q: Float[Array, "B T H C"],
        attended: Float[Array, "B T H C"],
    ) -> Float[Array, "B T H C"]:
        """Mixes what the queries find in memory with what local attention found."""
        return attended

    def lookup(self, p: Params, memory: Memory) -> Lookup | None:
        """`read` as a `Lookup`, if that can say it, so that kernels do it; else None.

        A rule that changes what `read` does, be it in a method that `read` calls, says so here too.
        """
        return None

    def prepare(self, features: Features, mask: Bool[Array, "B S"]) -> Features:
        """What of a write does not depend on memory; `features` has `key` and `value` [B, S, K, C].

        It is computed for many segments at once, and given to `write` in place of `features`.
        """
        return features

    def write(self, memory: Memory, features: Features, mask: Bool[Array, "B S"]) -> Memory:
        """The memory after a segment of which `prepare` gave `features`.

        Tokens outside `mask` must leave no trace.
        """
        return memory

    def write_all(
        self, memory: Memory, segments: Features, mask: Bool[Array, "N B S"]
    ) -> tuple[Memory, Memory]:
        """Writes segments, of which `prepare` gave [N, ...]: by default one after the other.

        Rows that are not in a segment's `mask` keep their memory exactly.

        Returns:
            The memory after all of them, and as it was before each: arrays [N, B, ...].
        """

        def step(memory: Memory, segment: tuple[Features, Array]) -> tuple[Memory, Memory]:
            features, mask = segment
            written = self.write(memory, features, mask)

            def keep(new: Array, old: Array) -> Array:
                there = mask[:, 0].reshape(-1, *[1] * (new.ndim - 1))
                return jnp.where(there, new, old).astype(old.dtype)

            return jax.tree.map(keep, written, memory), memory

        # A GPU's host starts each round of a loop anew, so some of these small steps are written out;
        # all of a long sequence, in all layers, would take minutes to compile.
        unroll = min(len(mask), UNROLL) if jax.default_backend() == "gpu" else 1
        return jax.lax.scan(step, memory, (segments, mask), unroll=unroll)

    def write_loss(
        self, features: Features, wanted: Float[Array, "B T"]
    ) -> Float[Array, "B T"] | None:
        """The loss by which a rule that chooses tokens is taught which; one that does not leaves this out.

        Args:
            features: of new tokens, as `features` gave them.
            wanted: 1 for tokens that should be kept, 0 for others.
        """
        return None

    def gates(self, p: Params) -> dict[str, Array]:
        """For inspection: how much each query head listens to memory."""
        return {}

    def grouped(self, q: Float[Array, "B T H C"]) -> Float[Array, "B T K G C"]:
        """Query heads by the KV head they belong to, in float32."""
        q = q.reshape(*q.shape[:2], self.config.num_kv_heads, -1, self.config.head_dim)
        return q.astype(jnp.float32)

    def zeros(self, batch_size: int, *shape: int) -> Float[Array, "B K *shape"]:
        return jnp.zeros((batch_size, self.config.num_kv_heads, *shape), jnp.float32)
