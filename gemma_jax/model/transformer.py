"""Gemma 1, 2 and 3 from one set of Flax modules.

`Transformer` takes tokens and State and gives hidden states and State. A step is either a number of
whole segments, which every layer works on at once, or a few tokens within one segment (decoding is
one). `gemma_jax.model.scan` cuts texts of any length into such steps.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gemma_jax.config import GLOBAL, SLIDING, GemmaConfig
from gemma_jax.model import decoding, kernels
from gemma_jax.model import memory as memory_lib
from gemma_jax.model.attention import (
    attention_of_one,
    decoding_kernel_takes,
    local_attention,
    segment_kernel_takes,
)
from gemma_jax.model.layers import Embedder, FeedForward, RMSNorm, declare
from gemma_jax.model.state import (
    LayerState,
    Span,
    State,
    history_length,
    init_state,
    lay,
    past_limit,
    settle,
)
from gemma_jax.model.weights import Weight, declare_weight, product, product_apart

Params = dict[str, Any]
LOSSES = "losses"  # the collection that layers sow their memory's `write_loss` into

# JAX's names of what `keep_products` keeps; the last is cuDNN's attention.
PRODUCTS = ("dot_general", "dot_product_attention_fwd_wrapper")


class MemoryParams(nn.Module):
    """The parameters that a memory rule asks for, as a dict."""

    rule: memory_lib.MemoryRule

    @nn.compact
    def __call__(self) -> dict[str, Array]:
        return {
            name: declare(self, name, spec.axes, spec.shape, "float32", spec.init)
            for name, spec in self.rule.params().items()
        }


class Attention(nn.Module):
    """Local attention, and in global layers the recurrent memory behind it."""

    config: GemmaConfig
    layer_type: str

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: LayerState,
        span: Span,
        only: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B _ D"], LayerState]:
        """Returns the output, and the layer's streams with memory up to date (see `settle_layer`).

        With `only`, a slot of each row, the output [B, 1, D] is that of these slots.
        """
        config, dim = self.config, self.config.head_dim
        heads, kv_heads = config.num_heads, config.num_kv_heads

        def matrix(name: str, axes: tuple[str, str], *shape: int) -> Weight:
            return declare_weight(self, name, axes, shape, config.dtype, config.quantized)

        qkv = matrix("qkv", ("heads", "embed"), (heads + 2 * kv_heads) * dim, config.width)
        out = matrix("out", ("embed", "heads"), config.width, heads * dim)

        widths = heads * dim, kv_heads * dim, kv_heads * dim
        q, k, v = (y.reshape(*x.shape[:2], -1, dim) for y in product_apart(x, qkv, widths))
        if config.qk_norm:
            q = RMSNorm(config.norm_eps, config.dtype, "head_dim", name="query_norm")(q)
            k = RMSNorm(config.norm_eps, config.dtype, "head_dim", name="key_norm")(k)

        state = self._remember_sink(state, k, v, span)
        state = state.replace(keys=lay(state.keys, k, span), values=lay(state.values, v, span))
        recurrent = self.layer_type == GLOBAL
        rule = memory_lib.make_rule(config)
        p = MemoryParams(rule, name="memory")() if recurrent and rule.params() else {}
        before: Params = {}
        if recurrent:
            features = rule.features(p, x, q, k, v)
            if span.wanted is not None:
                self._sow_write_loss(rule, features, span)
            before, state = self._remember(rule, features, state, span)
        keys, values, history = state.keys, state.values, history_length(config, self.layer_type)
        if only is not None:
            q = jnp.take_along_axis(q, only[:, None, None, None], axis=1)
            keys, values, before, span = look_at(only, keys, values, before, span, history)
        sink = (state.sink_key, state.sink_value) if state.sink_key is not None else None
        options = {
            "history": history,
            "window": config.sliding_window if self.layer_type == SLIDING else None,
            "rope": config.rope(self.layer_type),
            "scale": config.query_scale,
            "softcap": config.attention_softcap,
        }

        def plain(q, keys, values, sink, span, p, before):
            attended = local_attention(q, keys, values, sink, span, **options)
            if not recurrent:
                return attended
            return self._read(rule, p, before, q, attended, span.num_segments)

        def of_one(q, keys, values, sink, span, p, before):
            memory = jax.tree.map(lambda leaf: leaf[0], before)
            lookup = memory_lib.lookup_of(rule, p, memory) if recurrent else None
            attended = attention_of_one(q, keys, values, sink, span, lookup, **options)
            if not recurrent or lookup is not None:
                return attended
            return self._read(rule, p, before, q, attended, 1)

        def of_segments(q, keys, values, sink, span, p, before):
            lookup = memory_lib.lookup_of_segments(rule, p, before)
            return local_attention(q, keys, values, sink, span, lookup, **options)

        attend = plain
        if decoding_kernel_takes(q, keys, span):
            attend = kernels.with_gradient_of(plain, of_one)
        elif recurrent and segment_kernel_takes(q, span, has_sink=sink is not None, **options):
            if memory_lib.lookup_of_segments(rule, p, before) is not None:
                attend = kernels.with_gradient_of(plain, of_segments)
        attended = attend(q, keys, values, sink, span, p, before)
        attended = attended.reshape(*attended.shape[:2], -1)
        return product(attended, out), state

    def _sow_write_loss(
        self, rule: memory_lib.MemoryRule, features: dict[str, Array], span: Span
    ) -> None:
        """The sum of the rule's `write_loss` over new tokens of which something is said."""
        loss = rule.write_loss(features, jnp.maximum(span.wanted, 0).astype(jnp.float32))
        if loss is not None:
            self.sow(LOSSES, "write", jnp.sum(loss, where=span.is_new & (span.wanted >= 0)))

    def _remember_sink(self, state: LayerState, k: Array, v: Array, span: Span) -> LayerState:
        if state.sink_key is None or span.steady:
            return state
        starts = ((span.past + span.fill == 0) & (span.count > 0))[:, None, None, None]
        return state.replace(
            sink_key=jnp.where(starts, k[:, :1], state.sink_key),
            sink_value=jnp.where(starts, v[:, :1], state.sink_value),
        )

    def _remember(
        self, rule: memory_lib.MemoryRule, features: dict[str, Array], state: LayerState, span: Span
    ) -> tuple[dict[str, Array], LayerState]:
        """Writes segments as they leave sight; returns memory at each segment's start, [N, B, ...]."""
        features = {name: lay(state.features[name], new, span) for name, new in features.items()}
        state = state.replace(features=features)
        if not span.whole_segments:  # nothing leaves sight before `settle_layer`
            return jax.tree.map(lambda leaf: leaf[None], state.memory), state
        memory, before = memory_lib.write_segments(
            rule, state.memory, *leaving_segments(self.config, state, span)
        )
        return before, state.replace(memory=memory)

    def _read(
        self,
        rule: memory_lib.MemoryRule,
        p: Params,
        before: Params,
        q: Array,
        attended: Array,
        number: int,
    ) -> Array:
        """Reads memory as it stood at the start of each of `number` segments."""

        def by_segment(y: Array) -> Array:
            return jnp.moveaxis(y.reshape(y.shape[0], number, -1, *y.shape[2:]), 1, 0)

        with jax.default_matmul_precision("highest"):
            read = jax.vmap(functools.partial(rule.read, p))
            mixed = read(before, by_segment(q), by_segment(attended))
        return jnp.moveaxis(mixed, 0, 1).reshape(attended.shape)


class Block(nn.Module):
    """One layer: attention and feed-forward, each between norms and added to the residual."""

    config: GemmaConfig
    layer_type: str

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: LayerState,
        span: Span,
        only: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B _ D"], LayerState]:
        """With `only`, a slot of each row, the output [B, 1, D] is that of these slots."""
        config = self.config

        def norm(name: str, y: Array) -> Array:
            return RMSNorm(config.norm_eps, config.dtype, name=name)(y)

        attention = Attention(config, self.layer_type, name="attention")
        y, state = attention(norm("pre_attention_norm", x), state, span, only)
        if only is not None:
            x = jnp.take_along_axis(x, only[:, None, None], axis=1)
        x = x + (norm("post_attention_norm", y) if config.post_norms else y)
        mlp = FeedForward(config.mlp_dim, config.dtype, config.quantized, name="mlp")
        y = mlp(norm("pre_mlp_norm", x))
        x = x + (norm("post_mlp_norm", y) if config.post_norms else y)
        return x, state


def keep_products(primitive: Any, *_: Any, **__: Any) -> bool:
    """What a layer keeps for its backward pass: what takes long to compute. A checkpoint policy."""
    return primitive.name in PRODUCTS


@functools.cache
def layer_function(config: GemmaConfig, layer_type: str, remat: bool) -> Callable[..., Any]:
    """A layer as a function of its parameters and what `Block` is given; gives also what it sows.

    JAX traces it once for all layers of a kind that are given the same shapes, and puts the trace in the
    place of each. It lasts until `jax.clear_caches()`, beyond the programs it is put into.
    """
    kind = nn.remat(Block, policy=keep_products) if remat else Block
    block = kind(config, layer_type, parent=None)

    def plain(params: Params, *given: Any) -> tuple[tuple[Array, LayerState], Params]:
        return block.apply({"params": params}, *given, mutable=[LOSSES])

    def by_kernel(params: Params, *given: Any) -> tuple[tuple[Array, LayerState], Params]:
        return decoding.layer_of_one(config, params, *given), {}

    def apply(
        params: Params,
        x: Array,
        state: LayerState,
        span: Span,
        only: Int[Array, " B"] | None = None,
    ) -> tuple[tuple[Array, LayerState], Params]:
        if only is None and decoding.takes(config, layer_type, params, x, state, span):
            return kernels.with_gradient_of(plain, by_kernel)(params, x, state, span)
        return plain(params, x, state, span, only)

    return jax.jit(apply, inline=True)


class Transformer(nn.Module):
    """Gemma's decoder: tokens and State in, hidden states and State out.

    With `remat_layers` the backward pass computes again whatever is no product.
    """

    config: GemmaConfig
    remat_layers: bool = False

    def setup(self):
        config = self.config
        self.embedder = Embedder(
            config.vocab_size,
            config.width,
            config.tied_embeddings,
            config.dtype,
            config.quantized,
        )
        self.layers = [Block(config, kind) for kind in config.layer_types]
        self.final_norm = RMSNorm(config.norm_eps, config.dtype)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        state: State,
        count: Int[Array, " B"] | None = None,
        wanted: Int[Array, "B T"] | None = None,
        *,
        last_only: bool = False,
        steady: bool = False,
    ) -> tuple[Float[Array, "B _ D"], State]:
        """One step over T slots; see `state.Span` for where its tokens must stand.

        Args:
            tokens: T < S tokens that fit into the current segment, or whole segments, whose first
                `state.fill` slots are ignored.
            count: new tokens of each row; all slots by default.
            wanted: which tokens memory should keep, see `scan.forward`: the rule's `write_loss` is sown
                into the collection LOSSES.
            last_only: whether hidden states are wanted of each row's last new token alone, [B, 1, D];
                then the last layer attends and feeds forward for these tokens alone.
            steady: promises that no row starts its text or completes its segment, for steps within
                one segment.
        """
        segment_length = self.config.memory.segment_length
        slots = tokens.shape[1]
        if count is None:
            count = slots - (state.fill if slots >= segment_length else 0) + 0 * state.fill
        span = Span(state.fill, state.past, count, slots, segment_length, wanted, steady)
        x = self.embedder.encode(tokens)
        last = jnp.maximum(span.first + count - 1, 0) if last_only else None
        layers = []
        for i, (block, layer) in enumerate(zip(self.layers, state.layers, strict=True)):
            given = x, layer, span, last if i == self.config.num_layers - 1 else None
            if self.is_initializing():
                x, layer = block(*given)
            else:
                apply = layer_function(self.config, block.layer_type, self.remat_layers)
                with jax.named_scope(block.name):
                    (x, layer), sown = apply(block.variables["params"], *given)
                for loss in jax.tree.leaves(sown):
                    self.sow(LOSSES, "write", loss)
            layers.append(layer)
        return self.final_norm(x), advance(self.config, state, tuple(layers), span)

    def logits(self, hidden: Float[Array, "*b D"]) -> Float[Array, "*b V"]:
        """Logits in float32."""
        logits = self.embedder.decode(hidden)
        cap = self.config.final_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def logits_of_all(self, tokens: Array, state: State) -> Array:
        return self.logits(self(tokens, state)[0])


def look_at(
    only: Int[Array, " B"], keys: Array, values: Array, before: Params, span: Span, history: int
) -> tuple[Array, Array, Params, Span]:
    """The window of one slot of each row, memory at its segment's start, and a span of that slot."""
    length = span.segment_length
    n = only // length if span.whole_segments else jnp.zeros_like(only)

    def window(stream: Array) -> Array:
        cut = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=history + length)
        return jax.vmap(cut)(stream, n * length)

    before = jax.tree.map(
        lambda leaf: jnp.take_along_axis(leaf, n.reshape(1, -1, *[1] * (leaf.ndim - 2)), axis=0),
        before,
    )
    at = only if span.whole_segments else span.fill + only
    one = Span(at - n * length, span.past + n * length, jnp.ones_like(n), 1, length)
    return window(keys), window(values), before, one


def leaving_segments(
    config: GemmaConfig, state: LayerState, span: Span
) -> tuple[dict[str, Array], Array]:
    """The segments that leave local sight as those of the span are completed.

    Returns:
        What a rule is given of their tokens, arrays [N, B, S, ...], and [N, B], whether they are there
        and leave.
    """
    length, number = config.memory.segment_length, span.num_segments

    def segments(stream: Array) -> Array:
        stream = stream[:, : number * length]
        return jnp.moveaxis(stream.reshape(-1, number, length, *stream.shape[2:]), 1, 0)

    streams = {"key": state.keys, "value": state.values, **state.features}
    n = jnp.arange(number)[:, None]
    history = history_length(config, GLOBAL)
    exists = span.past + n * length >= history  # the first segment has none before it
    return jax.tree.map(segments, streams), exists & (span.completed > n)


def settle_layer(config: GemmaConfig, layer_type: str, state: LayerState, span: Span) -> LayerState:
    """From streams back to buffers; writes to memory what `Attention` has not written yet."""
    window = history_length(config, layer_type) + config.memory.segment_length
    memory = state.memory
    if memory and not span.whole_segments:
        rule = memory_lib.make_rule(config)
        memory, _ = memory_lib.write_segments(rule, memory, *leaving_segments(config, state, span))
    return state.replace(
        keys=settle(state.keys, span, window),
        values=settle(state.values, span, window),
        features={name: settle(stream, span, window) for name, stream in state.features.items()},
        memory=memory,
    )


def advance(
    config: GemmaConfig,
    state: State,
    layers: tuple[LayerState, ...],
    span: Span,
) -> State:
    """The State after a step whose layers left `layers`."""

    def settle_all(layers: tuple[LayerState, ...]) -> tuple[LayerState, ...]:
        pairs = zip(config.layer_types, layers, strict=True)
        return tuple(settle_layer(config, kind, layer, span) for kind, layer in pairs)

    def truncate(layers: tuple[LayerState, ...]) -> tuple[LayerState, ...]:
        def cut(old: LayerState, new: LayerState) -> LayerState:
            return jax.tree.map(lambda a, b: b[:, : a.shape[1]], old, new)

        return tuple(cut(old, new) for old, new in zip(state.layers, layers, strict=True))

    if span.steady:  # no segment is complete
        length, fill = state.length + span.count, state.fill + span.count
        return State(length, fill, state.past, truncate(layers))
    if span.whole_segments:
        layers = settle_all(layers)
    else:
        layers = jax.lax.cond(jnp.any(span.completed > 0), settle_all, truncate, layers)
    left = span.completed * span.segment_length
    return State(
        length=state.length + span.count,
        fill=state.fill + span.count - left,
        past=jnp.minimum(state.past + left, past_limit(config)),
        layers=layers,
    )


def init_params(config: GemmaConfig, key: Array) -> Params:
    """Random parameters: N(0, 0.02), norms 0; arrays as `abstract_params` describes them."""
    return nn.meta.unbox(_init_boxed(config, key))


def abstract_params(config: GemmaConfig) -> Params:
    """Shapes and dtypes of all parameters, as a nested dict of `jax.ShapeDtypeStruct`."""
    return nn.meta.unbox(_eval_boxed(config))


def param_axes(config: GemmaConfig) -> Params:
    """The logical axes of all parameters, as a nested dict of `jax.sharding.PartitionSpec`."""
    return nn.get_partition_spec(_eval_boxed(config))


def init_memory_params(config: GemmaConfig, key: Array) -> Params:
    """Fresh parameters of the memory rule alone, in their places in the tree of all parameters."""
    rule = memory_lib.make_rule(config)
    layers = [i for i, kind in enumerate(config.layer_types) if kind == GLOBAL and rule.params()]
    return {
        f"layers_{i}": {
            "attention": {
                "memory": nn.meta.unbox(MemoryParams(rule).init(jax.random.fold_in(key, i)))[
                    "params"
                ]
            }
        }
        for i in layers
    }


def _init_boxed(config: GemmaConfig, key: Array) -> Params:
    tokens = jnp.zeros((1, 1), jnp.int32)
    return Transformer(config).init(key, tokens, init_state(config), method="logits_of_all")[
        "params"
    ]


def _eval_boxed(config: GemmaConfig) -> Params:
    return jax.eval_shape(lambda key: _init_boxed(config, key), jax.random.key(0))
