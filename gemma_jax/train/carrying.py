"""Memories carried from one sequence to another, so that training meets used ones."""

from typing import Any

import jax
import jax.numpy as jnp

from gemma_jax.config import GLOBAL, GemmaConfig
from gemma_jax.model import memory as memory_lib
from gemma_jax.train.step import Memories


def empty_memories(config: GemmaConfig, rows: int) -> Memories:
    """Of texts that begin: what each layer's memory holds of nothing."""
    rule = memory_lib.make_rule(config)
    return tuple(rule.init(rows) if kind == GLOBAL else {} for kind in config.layer_types)


@jax.jit
def begin_with(empty: Memories, carried: Memories, start: Any) -> Memories:
    """Memories that sequences begin with: those kept at `start` [B], or empty ones (FRESH)."""

    def choose(empty: Any, kept: Any) -> Any:
        there = (start >= 0).reshape(-1, *[1] * (kept.ndim - 1))
        return jnp.where(there, kept[jnp.maximum(start, 0)], empty)

    return jax.tree.map(choose, empty, carried)


@jax.jit
def keep_newest(carried: Memories, memories: Memories) -> Memories:
    """The memories kept for later sequences: the newest first."""
    return jax.tree.map(
        lambda kept, new: jnp.concatenate([new, kept])[: len(kept)], carried, memories
    )
