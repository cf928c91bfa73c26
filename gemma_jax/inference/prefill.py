"""Reading: tokens into State, and the logits of what comes next."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gemma_jax.config import GemmaConfig
from gemma_jax.model.scan import default_step_tokens, keeps_grid, logits, scan_steps
from gemma_jax.model.state import State
from gemma_jax.model.transformer import Params

default_chunk_tokens = default_step_tokens


def piece_sizes(config: GemmaConfig) -> tuple[int, int]:
    """Tokens of the pieces that a text is read in: a short one, or what is left of a long one; a long one.

    On a GPU the latter are twice as large. That takes a little less time, and more memory, which weights in
    int8 are there to save.
    """
    small = default_chunk_tokens(config)
    double = jax.default_backend() == "gpu" and not config.quantized
    return small, 2 * small if double and keeps_grid(config, 2 * small) else small


@functools.partial(
    jax.jit, static_argnames=("config", "chunk_tokens", "fits"), donate_argnames=("state",)
)
def prefill(
    params: Params,
    tokens: Int[Array, "B T"],
    state: State,
    *,
    config: GemmaConfig,
    lengths: Int[Array, " B"] | None = None,
    chunk_tokens: int | None = None,
    fits: bool = False,
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
        fits: promises that each row has no more tokens than there is `scan.room` for; more are left
            out. Then no step is empty, and the host need not ask the device which.

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
        fits=fits,
    )
    return logits(params, last, config=config), state
