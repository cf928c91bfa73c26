"""Decoding: tokens out of State, in blocks of a fixed number of steps."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gemma_jax.config import GemmaConfig
from gemma_jax.inference.sampling import Sampling, draw
from gemma_jax.model.scan import logits as logits_of
from gemma_jax.model.state import State
from gemma_jax.model.transformer import Params, Transformer

# Kernels that do not wait for each other may run side by side: most of them are small.
SIDE_BY_SIDE = {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"}


def _compiled(block: Callable) -> Callable:
    """`block` by `jax.jit`; with options of the compiler but where it is part of another program."""
    names = {
        "static_argnames": ("config", "sampling", "num_tokens"),
        "donate_argnames": ("state",),
    }
    alone, within = jax.jit(block, compiler_options=SIDE_BY_SIDE, **names), jax.jit(block, **names)

    @functools.wraps(block)
    def compiled(*args: Any, **kwargs: Any) -> Any:
        leaves = jax.tree.leaves((args, kwargs))
        traced = any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
        return (within if traced else alone)(*args, **kwargs)

    for name in ("lower", "trace", "_cache_size"):
        setattr(compiled, name, getattr(alone, name))
    return compiled


@_compiled
def decode_block(
    params: Params,
    logits: Float[Array, "B V"],
    state: State,
    *,
    config: GemmaConfig,
    sampling: Sampling,
    key: Array,
    num_tokens: int,
    stop_ids: tuple[int, ...] | Int[Array, " E"] = (),
) -> tuple[Int[Array, "B num_tokens"], Int[Array, " B"], Float[Array, "B V"], State]:
    """Samples up to `num_tokens` tokens per row and feeds each back to the model.

    A row ends with the first of `stop_ids` it samples, which counts as its last token. The key of a
    token depends on `key`, its row and its place in the text alone, so the same key gives the same
    text however it is cut into blocks.

    Args:
        logits: of what comes next, from `prefill` or the block before.
        state: consumed; advanced over exactly `counts[b]` tokens.
        stop_ids: an id below 0 stops nothing.

    Returns:
        Tokens (those from `counts[b]` on mean nothing and are 0), counts, logits of what comes
        next, and State.
    """
    model = Transformer(config)
    rows = jnp.arange(logits.shape[0])

    def step(carry, _, steady):
        logits, state, going = carry
        keys = jax.vmap(lambda row, at: jax.random.fold_in(jax.random.fold_in(key, row), at))(
            rows, state.length
        )
        token = jnp.where(going, draw(sampling, logits, keys), 0)
        count = going.astype(jnp.int32)
        hidden, state = model.apply({"params": params}, token[:, None], state, count, steady=steady)
        new = logits_of(params, hidden[:, 0], config=config)
        logits = jnp.where(going[:, None], new, logits)
        stopped = jnp.isin(token, jnp.asarray(stop_ids, jnp.int32))
        return (logits, state, going & ~stopped), (token, count)

    def steps(carry, steady):
        return jax.lax.scan(functools.partial(step, steady=steady), carry, None, length=num_tokens)

    # Most blocks stay within a segment: a loop that never asks whether one begins or is complete.
    length = config.memory.segment_length
    carry = (logits, state, jnp.ones(logits.shape[0], bool))
    any_step, steady = (functools.partial(steps, steady=steady) for steady in (False, True))
    if num_tokens == 1:  # nothing to save
        carry, (tokens, counts) = any_step(carry)
    else:
        changes = jnp.any((state.fill + num_tokens >= length) | (state.past + state.fill == 0))
        carry, (tokens, counts) = jax.lax.cond(changes, any_step, steady, carry)
    logits, state, _ = carry
    return tokens.T, counts.sum(axis=0), logits, state
