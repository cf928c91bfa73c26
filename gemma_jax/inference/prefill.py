"""Reading: tokens into State, and the logits of what comes next."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gemma_jax.config import GemmaConfig
from gemma_jax.model.scan import default_step_tokens, logits, scan_steps
from gemma_jax.model.state import State
from gemma_jax.model.transformer import Params

default_chunk_tokens = default_step_tokens


@functools.partial(jax.jit, static_argnames=("config", "chunk_tokens"), donate_argnames=("state",))
def prefill(
    params: Params,
    tokens: Int[Array, "B T"],
    state: State,
    *,
    config: GemmaConfig,
    lengths: Int[Array, " B"] | None = None,
    chunk_tokens: int | None = None,
) -> tuple[Float[Array, "B V"], State]:
    """Reads tokens and gives the logits of each row's last one.

    Args:
        params: nested dict as `abstract_params(config)` describes it.
        tokens: right-padded when `lengths` is given.
        state: continues this State, which is consumed.
        lengths: tokens of each row; all T by default. A row of length 0 keeps its State, and its
            logits are NaN.
        chunk_tokens: tokens the model works on at once: whole segments, or fewer than one; suits
            the device by default.

    Returns:
        Logits in float32, and the State advanced over the tokens.
    """

    def keep_last(carry, hidden, first, count):
        return jnp.where(count[:, None] > 0, hidden[:, 0], carry), None

    nothing = jnp.full((tokens.shape[0], config.width), jnp.nan, config.dtype)
    last, _, state = scan_steps(
        params,
        tokens,
        state,
        keep_last,
        nothing,
        config=config,
        lengths=lengths,
        step_tokens=chunk_tokens,
        last_only=True,
    )
    return logits(params, last, config=config), state
