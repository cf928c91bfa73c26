"""A step of training: loss through the memory, gradient, AdamW.

Master weights are float32; the layers compute in `config.dtype` with copies made once a step. All of a
sequence's segments are in the gradient: what was written early learns from what is asked late.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float, Int

from gemma_jax.config import GemmaConfig
from gemma_jax.model.scan import Remat, forward
from gemma_jax.model.state import State, init_state
from gemma_jax.model.transformer import Params, abstract_params

LOSS_ROWS = 4096  # tokens whose logits exist at once; a row of 256,000 takes 1 MB

LearningRate = float | optax.Schedule
Metrics = dict[str, Array]


@struct.dataclass
class Batch:
    """What a model reads, and what it should have said after each token.

    Attributes:
        tokens: what is read.
        targets: the token that comes next, e.g. `tokens` one place on.
        weights: how much each prediction counts; 0 masks it.
    """

    tokens: Int[Array, "B T"]
    targets: Int[Array, "B T"]
    weights: Float[Array, "B T"]


def cross_entropy(
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"],
    targets: Int[Array, " N"],
    weights: Float[Array, " N"],
    *,
    softcap: float | None = None,
    rows: int = LOSS_ROWS,
) -> Float[Array, ""]:
    """Weighted sum of -log p(target) in nats, with the logits of `rows` tokens at a time.

    Products have operands of `hidden`'s dtype and float32 sums. The gradient is computed along with the
    loss, so that no logits are kept or computed twice; that of `head` is summed in float32.
    """
    slices = max(-(-hidden.shape[0] // rows), 1)
    pad = slices * rows - hidden.shape[0] if slices > 1 else 0

    def cut(x: Array) -> Array:
        return jnp.pad(x, [(0, pad)] + [(0, 0)] * (x.ndim - 1)).reshape(slices, -1, *x.shape[1:])

    return _cross_entropy(softcap, cut(hidden), head, cut(targets), cut(weights))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(
    softcap: float | None, hidden: Array, head: Array, targets: Array, weights: Array
) -> Array:
    """Of slices [n, rows, ...]."""
    head = head.astype(hidden.dtype)

    def step(total: Array, part: tuple[Array, ...]) -> tuple[Array, None]:
        hidden, targets, weights = part
        return total + _loss(softcap, _product("RD,VD->RV", hidden, head), targets, weights), None

    return jax.lax.scan(step, jnp.float32(0), (hidden, targets, weights))[0]


def _loss_and_gradients(softcap, hidden, head, targets, weights):
    small = head.astype(hidden.dtype)

    def step(carry, part):
        total, of_head = carry
        hidden, targets, weights = part
        scores = _product("RD,VD->RV", hidden, small)
        loss, slope = jax.value_and_grad(functools.partial(_loss, softcap))(
            scores, targets, weights
        )
        slope = slope.astype(hidden.dtype)
        of_hidden = _product("RV,VD->RD", slope, small).astype(hidden.dtype)
        return (total + loss, of_head + _product("RV,RD->VD", slope, hidden)), of_hidden

    start = (jnp.float32(0), jnp.zeros(head.shape, jnp.float32))
    (total, of_head), of_hidden = jax.lax.scan(step, start, (hidden, targets, weights))
    return total, (of_hidden, of_head.astype(head.dtype))


def _scale_gradients(softcap, gradients, slope):
    of_hidden, of_head = ((slope * x).astype(x.dtype) for x in gradients)
    return of_hidden, of_head, None, None


_cross_entropy.defvjp(_loss_and_gradients, _scale_gradients)


def _loss(softcap: float | None, scores: Array, targets: Array, weights: Array) -> Array:
    scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
    # Not a gather, whose gradient would be a scatter into all logits.
    is_target = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1) == targets[:, None]
    right = jnp.sum(jnp.where(is_target, scores, 0.0), axis=-1)
    return jnp.sum(weights * (jax.nn.logsumexp(scores, axis=-1) - right))


def _product(subscripts: str, x: Array, y: Array) -> Array:
    return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)


@functools.partial(jax.jit, static_argnames=("config", "step_tokens", "remat"))
def batch_loss(
    params: Params,
    batch: Batch,
    state: State | None = None,
    *,
    config: GemmaConfig,
    step_tokens: int | None = None,
    remat: Remat = "layers",
) -> Float[Array, ""]:
    """Mean of -log p(target) in nats over a batch, by its weights; 0 where all of them are 0.

    Args:
        params: float32 master weights; the layers compute with copies in `config.dtype`.
        state: what was read before, every row at the start of a segment; new texts by default.
        step_tokens, remat: see `forward`.
    """
    rows = batch.tokens.shape[0]
    hidden, _ = forward(
        compute_params(params, config),
        batch.tokens,
        init_state(config, rows) if state is None else state,
        config=config,
        step_tokens=step_tokens,
        aligned=True,
        remat=remat,
    )
    weights = batch.weights / jnp.maximum(jnp.sum(batch.weights), 1e-9)
    embedder = params["embedder"]
    return cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]),
        embedder["embedding" if config.tied_embeddings else "head"],
        batch.targets.reshape(-1),
        weights.reshape(-1),
        softcap=config.final_softcap,
    )


def compute_params(params: Params, config: GemmaConfig) -> Params:
    """Copies in the dtypes of `abstract_params`, but for the embedding.

    Tokens are looked up in the master copy, so that the gradients of equal tokens are summed in float32.
    """
    copies = jax.tree.map(lambda x, like: x.astype(like.dtype), params, abstract_params(config))
    return copies | {"embedder": params["embedder"]}


def make_optimizer(
    learning_rate: LearningRate,
    memory_learning_rate: LearningRate | None = None,
    *,
    weight_decay: float = 0.0,
    clip_norm: float = 1.0,
    b1: float = 0.9,
    b2: float = 0.95,
    moment_dtype: str | None = None,
) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2019) with gradients clipped by their global norm.

    Args:
        learning_rate: a number, or a schedule by the number of steps taken.
        memory_learning_rate: of the memory's own parameters, which start from nothing; as the others'
            by default.
        weight_decay: of matrices and embeddings; norms and the memory's parameters have none.
        moment_dtype: of the first moment; float32 by default.
    """
    rates = {
        "model": learning_rate,
        "memory": learning_rate if memory_learning_rate is None else memory_learning_rate,
    }
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.scale_by_adam(b1, b2, mu_dtype=moment_dtype),
        optax.add_decayed_weights(weight_decay, mask=_decays),
        optax.partition(
            {group: optax.scale_by_learning_rate(rate) for group, rate in rates.items()}, _groups
        ),
    )


def _groups(params: Params) -> Params:
    """The group of each parameter."""
    return jax.tree.map_with_path(lambda path, _: "memory" if _is_memory(path) else "model", params)


def _decays(params: Params) -> Params:
    return jax.tree.map_with_path(lambda path, x: x.ndim > 1 and not _is_memory(path), params)


def _is_memory(path: tuple[Any, ...]) -> bool:
    return any(part.key == "memory" for part in path)


def make_train_step(
    config: GemmaConfig,
    optimizer: optax.GradientTransformation,
    *,
    step_tokens: int | None = None,
    remat: Remat = "layers",
) -> Callable[..., tuple[Params, Any, Metrics]]:
    """Makes the jitted step

        params, optimizer_state, metrics = step(params, optimizer_state, batch, state=None)

    Parameters (float32) and the optimiser's state (`optimizer.init(params)`) are consumed; `state` is
    as in `batch_loss`. Metrics are scalars: `loss`, and `gradient_norm` before clipping.
    """
    loss = functools.partial(batch_loss, config=config, step_tokens=step_tokens, remat=remat)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(params, optimizer_state, batch, state=None):
        value, gradients = jax.value_and_grad(loss)(params, batch, state)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
        metrics = {"loss": value, "gradient_norm": optax.global_norm(gradients)}
        return optax.apply_updates(params, updates), optimizer_state, metrics

    return train_step
