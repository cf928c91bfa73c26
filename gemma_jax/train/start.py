"""Where a model from scratch begins."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from gemma_jax.config import GemmaConfig
from gemma_jax.model.adapting import is_memory
from gemma_jax.model.transformer import Params, init_params

INIT_SPREAD = 0.02  # of `init_params`, at any width
ENDS_OF_BRANCHES = ("out", "down")  # matrices whose products are added to the residual stream


def fresh_params(config: GemmaConfig, key: Array) -> Params:
    """Random float32 parameters that small models learn from faster than from `init_params`.

    Matrices are N(0, 1 / inputs), so that what goes through them keeps its size at any width; those at
    the end of a residual branch are smaller by sqrt(2 layers) (Radford et al. 2019, section 2.3). Delta
    memories are read from the start: nothing has been learnt yet that they could disturb.
    """

    def scaled(path: tuple[Any, ...], leaf: Array) -> Array:
        leaf = leaf.astype(jnp.float32)
        if is_memory(path):
            is_read_gate = path[-1].key == "gate" and config.memory.rule.endswith("_delta")
            return jnp.ones_like(leaf) if is_read_gate else leaf
        if leaf.ndim < 2:
            return leaf
        spread = leaf.shape[1] ** -0.5
        if path[-1].key in ENDS_OF_BRANCHES:
            spread /= math.sqrt(2 * config.num_layers)
        return leaf * (spread / INIT_SPREAD)

    return jax.tree.map_with_path(scaled, init_params(config, key))
