"""A layer of a decoding step by one kernel, for a single text on a Hopper GPU.

`transformer.Block` says what a layer computes; this is the same for the models and memory rules that
`kernels.layer` takes.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from gemma_jax.config import GLOBAL, GemmaConfig
from gemma_jax.model import kernels
from gemma_jax.model import memory as memory_lib
from gemma_jax.model.attention import seen_by_one
from gemma_jax.model.rope import rope_table
from gemma_jax.model.state import LayerState, Span, history_length, lay
from gemma_jax.model.weights import SCALE

Params = dict[str, Any]


def takes(
    config: GemmaConfig, layer_type: str, params: Params, x: Array, state: LayerState, span: Span
) -> bool:
    """Whether `layer_of_one` does such a step of such a layer."""
    step = span.steady and span.slots == 1 and span.wanted is None
    step = step and len(x) == 1 and x.dtype == jnp.bfloat16
    if not step or layer_type != GLOBAL or not kernels.wanted():
        return False
    if config.qk_norm or config.post_norms or config.attention_softcap is not None:
        return False
    attention, mlp = params["attention"], params["mlp"]
    dtypes = {m.dtype for m in (attention["qkv"], attention["out"], mlp["gate_up"], mlp["down"])}
    if dtypes not in ({jnp.dtype("bfloat16")}, {jnp.dtype("int8")}):
        return False
    from gemma_jax.model.kernels import layer as kernel

    shapes = (config.width, config.mlp_dim, config.num_heads, config.num_kv_heads, config.head_dim)
    if not (kernels.lays_out_registers() and kernel.takes(*shapes, window=state.keys.shape[1])):
        return False
    rule, p = memory_lib.make_rule(config), params["attention"].get("memory", {})
    return memory_lib.reads_nothing(rule) or memory_lib.lookup_of(rule, p, state.memory) is not None


def layer_of_one(
    config: GemmaConfig,
    params: Params,
    x: Float[Array, "1 1 D"],
    state: LayerState,
    span: Span,
) -> tuple[Float[Array, "1 1 D"], LayerState]:
    """What `Block` with these parameters gives."""
    from gemma_jax.model.kernels import layer as kernel

    attention, mlp = params["attention"], params["mlp"]
    rule, p = memory_lib.make_rule(config), attention.get("memory", {})
    lookup = None
    if not memory_lib.reads_nothing(rule):
        lookup = memory_lib.lookup_of(rule, p, state.memory)

    def matrix(parameters: Params, name: str) -> kernel.Matrix:
        values = parameters[name]
        values = values.reshape(len(values), -1, kernel.COLUMNS)
        return kernel.Matrix(values, parameters.get(name + SCALE))

    heads, dim, history = config.num_heads, config.head_dim, history_length(config, GLOBAL)
    keys, values = state.keys[0, :, 0], state.values[0, :, 0]
    sink = (keys[0], values[0])  # not seen where there is none
    if state.sink_key is not None:
        sink = state.sink_key[0, 0, 0], state.sink_value[0, 0, 0]
    cosine, sine = map(jnp.asarray, rope_table(config.rope(GLOBAL), dim, len(keys) + 1))
    seen = seen_by_one(span, history, None, has_sink=state.sink_key is not None)
    gate, write = memory_lib.write_gate_of(rule, p), None
    if gate is not None:
        write = gate, state.features["write"][0, :, 0]
    y, normed, qkv, keys, values, gates = kernel.layer_of_one(
        x[0, 0],
        kernel.Layer(
            params["pre_attention_norm"]["scale"],
            matrix(attention, "qkv"),
            matrix(attention, "out"),
            params["pre_mlp_norm"]["scale"],
            matrix(mlp, "gate_up"),
            matrix(mlp, "down"),
        ),
        keys,
        values,
        sink,
        jnp.append(seen[0], span.count),
        cosine,
        sine,
        lookup,
        write,
        eps=config.norm_eps,
        scale=config.query_scale,
    )
    state = state.replace(keys=keys[None, :, None], values=values[None, :, None])
    if gates is not None:
        return y[None, None], state.replace(features={"write": gates[None, :, None]})
    q, k, v = (
        part.reshape(1, 1, -1, dim) for part in jnp.split(qkv, [heads * dim, (heads + 1) * dim])
    )
    features = rule.features(p, normed[None, None], q, k, v)
    laid = {name: lay(state.features[name], new, span) for name, new in features.items()}
    return y[None, None], state.replace(features=laid)
