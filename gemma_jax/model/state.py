"""State: all that is carried from token to token, of one size whatever was read.

A row of a batch stands on its own grid of segments of S tokens. Each layer keeps a buffer of the
last P tokens before the current segment (its history) and room for the S tokens of the segment
itself. What a step does with it is the same everywhere:

    buffer [history P | current S]  --lay-->  stream [history P | slots]  --settle-->  buffer

`lay` puts new tokens behind those that are there, `settle` keeps what the next step needs. Slots
that hold no token are zero, so equal texts have equal States however they were split into calls.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from gemma_jax.config import GLOBAL, SLIDING, GemmaConfig
from gemma_jax.model import memory as memory_lib
from gemma_jax.model.device import default_device

HISTORY_MULTIPLE = 64  # a sliding layer's history is rounded up to it: kernels like even sizes


def _axes(*names: str | None, **kwargs: Any) -> Any:
    """A field whose logical axes are `names`."""
    return struct.field(metadata={"axes": names}, **kwargs)


@struct.dataclass
class LayerState:
    """What one layer carries. Keys are kept as they are before rotary embedding."""

    keys: Float[Array, "B window K C"] = _axes("batch", "window", "kv_heads", "head_dim")
    values: Float[Array, "B window K C"] = _axes("batch", "window", "kv_heads", "head_dim")
    sink_key: Float[Array, "B 1 K C"] | None = _axes("batch", None, "kv_heads", "head_dim")
    sink_value: Float[Array, "B 1 K C"] | None = _axes("batch", None, "kv_heads", "head_dim")
    features: dict[str, Array] = _axes("batch", "window")  # the rule's own, per token until written
    memory: dict[str, Array] = _axes("batch", "kv_heads")


@struct.dataclass
class State:
    """What a model carries from token to token; every row of the batch has its own lengths.

    Attributes:
        length: tokens read. Only a count: nothing is computed from it.
        fill: tokens in the current segment, 0 to S - 1.
        past: tokens before the current segment, counted no further than `past_limit(config)`.
        layers: one LayerState per layer.
    """

    length: Int[Array, " B"] = _axes("batch")
    fill: Int[Array, " B"] = _axes("batch")
    past: Int[Array, " B"] = _axes("batch")
    layers: tuple[LayerState, ...] = struct.field()


def history_length(config: GemmaConfig, layer_type: str) -> int:
    """P, the tokens before the current segment that a layer of this type keeps."""
    if layer_type == SLIDING:
        return math.ceil((config.sliding_window - 1) / HISTORY_MULTIPLE) * HISTORY_MULTIPLE
    return config.memory.segment_length if config.memory.local_attention == "transformer_xl" else 0


def past_limit(config: GemmaConfig) -> int:
    """Beyond so many tokens nothing depends on how many there were."""
    return max(history_length(config, kind) for kind in config.layer_types) + 1


def init_state(config: GemmaConfig, batch_size: int = 1) -> State:
    """The State of `batch_size` empty texts."""

    def layer(layer_type: str) -> LayerState:
        window = history_length(config, layer_type) + config.memory.segment_length
        heads = (config.num_kv_heads, config.head_dim)
        recurrent = layer_type == GLOBAL
        sink = recurrent and config.memory.sink

        def zeros(*shape: int) -> jax.Array:
            return jnp.zeros((batch_size, *shape, *heads), config.dtype)

        return LayerState(
            keys=zeros(window),
            values=zeros(window),
            sink_key=zeros(1) if sink else None,
            sink_value=zeros(1) if sink else None,
            features=memory_lib.init_features(config, batch_size, window) if recurrent else {},
            memory=memory_lib.make_rule(config).init(batch_size) if recurrent else {},
        )

    counts = [jnp.zeros((batch_size,), jnp.int32) for _ in range(3)]
    state = State(*counts, layers=tuple(layer(kind) for kind in config.layer_types))
    # Committed to its device as the State that a jitted function returns: it compiles only once.
    return jax.device_put(state, default_device())


def state_bytes(config: GemmaConfig, batch_size: int = 1) -> int:
    """Size of a State in bytes."""
    shapes = jax.eval_shape(lambda: init_state(config, batch_size))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


@struct.dataclass
class Span:
    """Where the tokens of one step stand: `slots` places per row, of which some hold new tokens.

    With fewer than S slots, slot 0 is the first free place of the current segment, and the new
    tokens must not go beyond that segment. Otherwise slots are whole segments, slot 0 is the first
    place of the current segment, and its first `fill` slots are tokens that State already holds.
    """

    fill: Int[Array, " B"]
    past: Int[Array, " B"]
    count: Int[Array, " B"]  # new tokens
    slots: int = struct.field(pytree_node=False)
    segment_length: int = struct.field(pytree_node=False)
    wanted: Int[Array, "B slots"] | None = None  # which tokens memory should keep, see `forward`
    # No row starts its text or completes its segment.
    steady: bool = struct.field(pytree_node=False, default=False)

    @property
    def whole_segments(self) -> bool:
        return self.slots >= self.segment_length

    @property
    def num_segments(self) -> int:
        """N, the segments that the slots span."""
        return max(self.slots // self.segment_length, 1)

    @property
    def first(self) -> Int[Array, " B"]:
        """Slot of the first new token."""
        return self.fill if self.whole_segments else jnp.zeros_like(self.fill)

    @property
    def is_new(self) -> Array:
        """[B, slots] bool: the slot holds a new token."""
        slot = jnp.arange(self.slots)
        return (slot >= self.first[:, None]) & (slot < (self.first + self.count)[:, None])

    @property
    def completed(self) -> Int[Array, " B"]:
        """Segments that are complete after the step."""
        return (self.fill + self.count) // self.segment_length


def lay(buffer: Array, new: Array, span: Span) -> Array:
    """Puts new tokens [B, slots, ...] behind those of a buffer [B, P + S, ...].

    Returns:
        A stream [B, P + max(S, slots) (+ slots - 1 when slots < S), ...], zero where no token is.
    """
    new = jnp.where(_expand(span.is_new, new), new, 0).astype(buffer.dtype)
    history = buffer.shape[1] - span.segment_length
    if span.whole_segments:
        extra = span.slots - span.segment_length
        old = jnp.pad(buffer, [(0, 0), (0, extra)] + [(0, 0)] * (buffer.ndim - 2))
        new = jnp.pad(new, [(0, 0), (history, 0)] + [(0, 0)] * (buffer.ndim - 2))
        return old + new  # a slot is zero in at least one of them
    room = jnp.pad(buffer, [(0, 0), (0, span.slots - 1)] + [(0, 0)] * (buffer.ndim - 2))
    if len(buffer) == 1:  # a plain slice, where `vmap` makes a scatter with its bounds checked
        return jax.lax.dynamic_update_slice_in_dim(room, new, history + span.fill[0], 1)
    insert = jax.vmap(
        lambda row, tokens, at: jax.lax.dynamic_update_slice_in_dim(row, tokens, at, 0)
    )
    return insert(room, new, history + span.fill)


def settle(stream: Array, span: Span, window: int) -> Array:
    """The buffer [B, window, ...] that remains of a stream when completed segments have left."""
    end = max(span.num_segments * span.segment_length - stream.shape[1] + window, 0)
    stream = jnp.pad(stream, [(0, 0), (0, end)] + [(0, 0)] * (stream.ndim - 2))
    keep = jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, window, 0))
    return keep(stream, span.completed * span.segment_length)


def _expand(mask: Array, like: Array) -> Array:
    return mask.reshape(mask.shape + (1,) * (like.ndim - mask.ndim))
