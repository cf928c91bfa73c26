"""Texts of any length through the model: `lax.scan` over steps that carry State.

A step takes `step_tokens` slots: whole segments, or fewer than S tokens of one segment. Rows stand at
their own places on their own grids, so each row takes as many of its tokens as the step has room for,
and steps in which no row has any left are skipped. To know that, the host waits for the device, unless it is
promised that there is none such. Every split of the same tokens into calls gives the same State.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gemma_jax.config import GemmaConfig
from gemma_jax.errors import UsageError
from gemma_jax.model.state import State
from gemma_jax.model.transformer import LOSSES, Params, Transformer

STEP_TOKENS = {"cpu": 256}  # enough for a CPU's matrix products; short prompts stay cheap
DEFAULT_STEP_TOKENS = 8192

Remat = Literal["layers", "steps"] | None


def default_step_tokens(config: GemmaConfig) -> int:
    """Slots of a step that suit the device: a divisor of S, or whole segments."""
    wanted = STEP_TOKENS.get(jax.default_backend(), DEFAULT_STEP_TOKENS)
    length = config.memory.segment_length
    if wanted >= length:
        return wanted // length * length
    return next(n for n in range(wanted, 0, -1) if length % n == 0)


def step_slots(config: GemmaConfig, total: int, step_tokens: int | None = None) -> int:
    """Slots of a step that reads [B, total] tokens: whole segments, or fewer than S."""
    length = config.memory.segment_length
    slots = min(step_tokens or default_step_tokens(config), max(total, 1))
    return -(-slots // length) * length if slots >= length else slots


def room(config: GemmaConfig, fill: int, total: int, step_tokens: int | None = None) -> int:
    """How many of `total` tokens fit into the fewest steps, for a row with `fill` in its segment."""
    slots, length = step_slots(config, total, step_tokens), config.memory.segment_length
    taken = 0
    for _ in range(-(-total // slots)):
        before = (fill + taken) % length
        taken += slots - before if slots >= length else min(slots, length - before)
    return min(taken, total)


def on_grid(config: GemmaConfig, total: int, step_tokens: int | None = None) -> bool:
    """Whether steps that read [B, total] tokens from the start of a segment on end where segments do."""
    slots, length = step_slots(config, total, step_tokens), config.memory.segment_length
    return slots >= length or length % slots == 0 or total <= slots


def keeps_grid(config: GemmaConfig, tokens: int) -> bool:
    """Whether pieces of so many tokens that follow each other begin or end where segments do."""
    length = config.memory.segment_length
    return tokens % length == 0 or length % tokens == 0


def scan_steps(
    params: Params,
    tokens: Int[Array, "B T"],
    state: State,
    visit: Callable[[Any, Array, Array, Array], tuple[Any, Any]],
    carry: Any,
    *,
    config: GemmaConfig,
    lengths: Int[Array, " B"] | None = None,
    wanted: Int[Array, "B T"] | None = None,
    step_tokens: int | None = None,
    fits: bool = False,
    remat: Remat = None,
    last_only: bool = False,
) -> tuple[Any, Any, State]:
    """Reads right-padded tokens step by step, showing each step's hidden states to `visit`.

    Args:
        visit: (carry, hidden [B, slots, D], first [B], count [B]) -> (carry, y), where the row's new
            tokens stand in the slots first to first + count; with `last_only`, hidden [B, 1, D] is
            that of the last of them.
        lengths: tokens of each row; all T by default.
        wanted: see `forward`.
        fits: promises that every row's tokens fit into the fewest steps, see `room`; tokens that do
            not are left out. They do where rows stand at the start of a segment and steps end where
            segments do.
        remat: what the backward pass computes again, see `forward`.

    Returns:
        The last carry; ((y, first, count, write loss) of each step, stacked), and the State.
    """
    batch, total = tokens.shape
    length = config.memory.segment_length
    slots = step_slots(config, total, step_tokens)
    if fits:
        num_steps = -(-total // slots)
    elif slots >= length:
        num_steps = -(-(total + length - 1) // slots)
    else:  # a step ends at a segment's end
        num_steps = -(-total // slots) + max(total + length - 2, 0) // length
    if lengths is None:
        lengths = jnp.full((batch,), total, jnp.int32)
    lengths = jnp.clip(jnp.asarray(lengths, jnp.int32), 0, total)
    model = Transformer(config, remat_layers=remat is not None)

    def apply(tokens, state, count, wanted):
        options = {"last_only": last_only, "mutable": [LOSSES]}
        (hidden, state), sown = model.apply(
            {"params": params}, tokens, state, count, wanted, **options
        )
        return hidden, state, sum(jax.tree.leaves(sown), jnp.float32(0))

    if remat == "steps":
        apply = jax.checkpoint(apply)

    def step(carry, _):
        state, taken, inner = carry
        first = state.fill if slots >= length else jnp.zeros_like(state.fill)
        most = slots - first if slots >= length else jnp.minimum(slots, length - state.fill)
        count = jnp.minimum(lengths - taken, most)

        def run(state, inner):
            at = jnp.clip(taken[:, None] + jnp.arange(slots) - first[:, None], 0, total - 1)
            look = functools.partial(jnp.take_along_axis, indices=at, axis=1)
            new = look(tokens), state, count, wanted if wanted is None else look(wanted)
            hidden, state, loss = apply(*new)
            inner, y = visit(inner, hidden, first, count)
            return state, inner, (y, loss)

        def skip(state, inner):
            like = jax.eval_shape(run, state, inner)[2]
            return state, inner, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)

        if fits:
            state, inner, (y, loss) = run(state, inner)
        else:
            there = jnp.any(count > 0)
            state, inner, (y, loss) = jax.lax.cond(there, run, skip, state, inner)
        return (state, taken + count, inner), (y, first, count, loss)

    if total == 0:
        raise UsageError("tokens has no columns: give at least one token.")
    start = (state, jnp.zeros((batch,), jnp.int32), carry)
    if num_steps == 1:  # without a loop nothing is copied for the backward pass
        (state, _, carry), steps = step(start, None)
        return carry, jax.tree.map(lambda leaf: leaf[None], steps), state
    (state, _, carry), steps = jax.lax.scan(step, start, None, length=num_steps)
    return carry, steps, state


@functools.partial(
    jax.jit,
    static_argnames=("config", "step_tokens", "aligned", "remat"),
    donate_argnames=("state",),
)
def forward(
    params: Params,
    tokens: Int[Array, "B T"],
    state: State,
    *,
    config: GemmaConfig,
    lengths: Int[Array, " B"] | None = None,
    wanted: Int[Array, "B T"] | None = None,
    step_tokens: int | None = None,
    aligned: bool = False,
    remat: Remat = None,
) -> tuple[Float[Array, "B T D"], State] | tuple[Float[Array, "B T D"], State, Float[Array, ""]]:
    """Hidden states at all positions, after the final norm; differentiable, for research and training.

    Args:
        params: nested dict as `abstract_params(config)` describes it.
        tokens: right-padded when `lengths` is given.
        state: continues this State, which is consumed.
        wanted: which tokens memory should keep: 1, or 0 for others, or -1 where nothing is said of one.
        step_tokens: slots of a step of the scan; suits the device by default.
        aligned: promises that every row of `state` stands at the start of a segment (as new ones
            do); this is faster.
        remat: what the backward pass computes again to save memory: nothing by default; with
            "layers" all but each layer's products; with "steps" all but the State before each step
            (and within a step as with "layers").

    Returns:
        Hidden states, zero beyond a row's length, and the State; with `wanted` a third, the write loss: the
        sum of the rule's `write_loss` over tokens of which something is said and layers that have memory,
        0 for rules that choose no tokens. `logits` turns hidden states into logits.
    """
    batch, total = tokens.shape
    # Then no slot between two tokens of a row is empty, and there is room for all of them.
    ordered = aligned and on_grid(config, total, step_tokens)

    def keep(carry, hidden, first, count):
        return carry, hidden

    _, (hidden, first, count, losses), state = scan_steps(
        params,
        tokens,
        state,
        keep,
        None,
        config=config,
        lengths=lengths,
        wanted=wanted,
        step_tokens=step_tokens,
        fits=ordered,
        remat=remat,
    )
    write_loss = () if wanted is None else (jnp.sum(losses),)
    slots = hidden.shape[2]
    if ordered:
        found = jnp.moveaxis(hidden, 0, 1).reshape(batch, -1, hidden.shape[-1])[:, :total]
        if lengths is None:
            return found, state, *write_loss
        there = jnp.arange(total)[:, None] < lengths[:, None, None]
        return jnp.where(there, found, 0), state, *write_loss
    end = jnp.cumsum(count, axis=0)  # [steps, B], tokens taken after each step
    position = jnp.arange(total)
    step = jnp.sum(position[:, None, None] >= end, axis=1).T  # [B, T], the step that took the token
    step = jnp.minimum(step, end.shape[0] - 1)
    begin = jnp.take_along_axis((end - count).T, step, axis=1)
    slot = jnp.take_along_axis(first.T, step, axis=1) + position - begin
    flat = jnp.moveaxis(hidden, 0, 1).reshape(batch, -1, hidden.shape[-1])
    at = jnp.clip(step * slots + slot, 0, flat.shape[1] - 1)
    found = jnp.take_along_axis(flat, at[..., None], axis=1)
    return jnp.where(position[:, None] < end[-1][:, None, None], found, 0), state, *write_loss


@functools.partial(jax.jit, static_argnames=("config",))
def logits(
    params: Params, hidden: Float[Array, "*b D"], *, config: GemmaConfig
) -> Float[Array, "*b V"]:
    """Logits in float32 of hidden states that `forward` gave."""
    return Transformer(config).apply({"params": params}, hidden, method="logits")
