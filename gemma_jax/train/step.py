"""A step of training: loss through the memory, gradient, AdamW.

Master weights are float32; the layers compute in `config.dtype` with copies made once a step. All of a
sequence's segments are in the gradient: what was written early learns from what is asked late. Where
only a part of a model is trained (`gemma_jax.model.adapting`), the rest has no gradient.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from gemma_jax.config import GLOBAL, GemmaConfig
from gemma_jax.model.adapting import is_memory, join
from gemma_jax.model.memory import inspect
from gemma_jax.model.scan import Remat, forward
from gemma_jax.model.state import State, init_state
from gemma_jax.model.transformer import Params, abstract_params
from gemma_jax.train.cross_entropy import cross_entropy

WRITE_BIAS = "write_bias"  # what rules call the bias of their write gates

LearningRate = float | optax.Schedule
Memories = tuple[dict[str, Array], ...]  # what the layers remember: `State.layers[i].memory`
Metrics = dict[str, Any]


@struct.dataclass
class Batch:
    """What a model reads, and what it should have said after each token.

    Attributes:
        tokens: what is read.
        targets: the token that comes next, e.g. `tokens` one place on.
        weights: how much each prediction counts; 0 masks it.
        answers: whether a target is part of an answer, which is measured apart; none is by default.
        wanted: which tokens memory should keep, see `forward`; by default nothing is said of any.
    """

    tokens: Int[Array, "B T"]
    targets: Int[Array, "B T"]
    weights: Float[Array, "B T"]
    answers: Bool[Array, "B T"] | None = None
    wanted: Int[Array, "B T"] | None = None


@struct.dataclass
class Scores:
    """What the predictions of a batch were worth. Of several batches: their sum.

    Attributes:
        loss: weighted sum of -log p(target) in nats.
        answer_loss: the same of answers, each token counting 1.
        answer_hits: how many of the answers' tokens were the likeliest.
        answer_tokens: how many there are.
        write_loss: sum of the rule's, by token and layer; 0 where nothing is said of any token.
    """

    loss: Float[Array, ""]
    answer_loss: Float[Array, ""]
    answer_hits: Float[Array, ""]
    answer_tokens: Float[Array, ""]
    write_loss: Float[Array, ""]


@functools.partial(jax.jit, static_argnames=("config", "step_tokens", "remat"))
def batch_loss(
    params: Params,
    batch: Batch,
    state: State | Memories | None = None,
    *,
    config: GemmaConfig,
    step_tokens: int | None = None,
    remat: Remat = "layers",
) -> Float[Array, ""]:
    """Mean of -log p(target) in nats over a batch, by its weights; 0 where all of them are 0.

    Args:
        params: float32 master weights; the layers compute with copies in `config.dtype`.
        state: what was read before, every row at the start of a segment; with memories alone, a text
            begins whose memory is not empty. New texts by default.
        step_tokens, remat: see `forward`.
    """
    batch = batch.replace(weights=_shares(batch.weights))
    options = {"config": config, "step_tokens": step_tokens, "remat": remat}
    return score_batch(params, batch, state, **options)[0].loss


def score_batch(
    params: Params,
    batch: Batch,
    state: State | Memories | None,
    *,
    config: GemmaConfig,
    step_tokens: int | None,
    remat: Remat,
) -> tuple[Scores, State]:
    """The scores of a batch, weights as they are, and the State after it; arguments as `batch_loss`'s."""
    rows = batch.tokens.shape[0]
    if not isinstance(state, State):
        state = start_state(config, rows, state)
    params = compute_params(params, config)
    hidden, state, *write_loss = forward(
        params,
        batch.tokens,
        state,
        config=config,
        wanted=batch.wanted,
        step_tokens=step_tokens,
        aligned=True,
        remat=remat,
    )
    loss, nll, hits = cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]),
        params["embedder"]["embedding" if config.tied_embeddings else "head"],
        batch.targets.reshape(-1),
        batch.weights.reshape(-1),
        softcap=config.final_softcap,
    )
    answers = jnp.zeros_like(hits) if batch.answers is None else batch.answers.reshape(-1)

    def total(x: Array) -> Array:
        return jnp.sum(jnp.where(answers, x, 0), dtype=jnp.float32)

    measured = (total(x) for x in (nll, hits, jnp.ones_like(nll)))
    return Scores(loss, *measured, *(write_loss or [jnp.float32(0)])), state


def start_state(config: GemmaConfig, rows: int, memories: Memories | None = None) -> State:
    """The State of texts that begin, with what their layers remember already if `memories` are given."""
    state = init_state(config, rows)
    if memories is None:
        return state
    layers = zip(state.layers, memories, strict=True)
    return state.replace(layers=tuple(layer.replace(memory=memory) for layer, memory in layers))


def _shares(weights: Array) -> Array:
    return weights / jnp.maximum(jnp.sum(weights), 1e-9)


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
    return jax.tree.map_with_path(lambda path, _: "memory" if is_memory(path) else "model", params)


def _decays(params: Params) -> Params:
    return jax.tree.map_with_path(lambda path, x: x.ndim > 1 and not is_memory(path), params)


def make_train_step(
    config: GemmaConfig,
    optimizer: optax.GradientTransformation,
    *,
    step_tokens: int | None = None,
    remat: Remat = "layers",
    accumulate: int = 1,
    watch: bool = False,
) -> Callable[..., tuple[Params, Any, Metrics]]:
    """Makes the jitted step

        params, optimizer_state, metrics = step(
            params, optimizer_state, batch, state=None, frozen=None, rate=1.0, write_penalty=0.0,
            write_shift=0.0, write_loss=0.0)

    Parameters (float32) and the optimiser's state (`optimizer.init(params)`) are consumed; `state` is
    as in `batch_loss`, and memories alone with `accumulate` above 1. `frozen` is the rest of a model of
    which `params` are a part, see `adapting.join`; `rate` multiplies the learning rates. A step whose loss
    or gradient is not finite changes nothing.

    `write_penalty` times log(1 + tokens written), mean of rows, heads and layers that count them, is
    minimised with the loss and no part of the `loss` that is measured. By the logarithm one write costs
    little where many are of use, and much where none is: over millions of tokens, it matters whether a
    gate opens seldom or never.

    `write_shift` is added to the logits of write gates. Where it changes from step to step, gates learn
    a margin: to open at facts without it, and to stay shut on everything else with the most of it.

    `write_loss` times the rule's mean loss of `batch.wanted`, of tokens of which something is said and
    layers that have memory, is minimised likewise.

    Metrics are scalars: `loss`, `gradient_norm` before clipping, and the mean `write_loss`, 0 where nothing
    is said. With `watch` also

        answer_loss, answer_accuracy    of the batch's answers, by token; NaN where it has none
        answer_tokens                   how many those are
        gradient_norms                  by layer, or other part of the tree
        finite                          by layer: whether its memory and window are, after the batch
        read                            mean size of the read gates, by layer that has memory
        written                         share of tokens written, likewise, of rules that count them
        memories                        what is remembered after the batch

    Args:
        step_tokens, remat: see `forward`.
        accumulate: in how many parts, one after the other, a batch's rows go through the model.
        watch: whether to measure all that.
    """
    options = {"config": config, "step_tokens": step_tokens, "remat": remat}
    layers = sum(kind == GLOBAL for kind in config.layer_types)

    def scores(params, frozen, write, batch, state):
        write_penalty, write_shift, write_loss = write
        joined = _shifted(params if frozen is None else join(frozen, params), write_shift)
        found, after = score_batch(joined, batch, state, **options)
        finite = jnp.stack([_all_finite(layer) for layer in after.layers])
        memories = tuple(layer.memory for layer in after.layers)
        minimised = found.loss + write_loss * found.write_loss
        if shares := written_shares(config, state, memories):
            tokens = batch.tokens.shape[1] * jnp.stack(shares)
            minimised += write_penalty / accumulate * jnp.mean(jnp.log1p(tokens))
        return minimised, (found, finite, memories)

    slope = jax.grad(scores, has_aux=True)

    def gradient(params, frozen, write, batch, state):
        if accumulate == 1:
            return slope(params, frozen, write, batch, state)

        def add(total, part):
            found, (scores, *after) = slope(params, frozen, write, *part)
            return jax.tree.map(jnp.add, total, (found, scores)), after

        zeros = jax.tree.map(jnp.zeros_like, params), Scores(*[jnp.float32(0)] * 5)
        parts = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), (batch, state))
        (found, scores), (finite, memories) = jax.lax.scan(add, zeros, parts)
        memories = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), memories)
        return found, (scores, finite.all(axis=0), memories)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(
        params,
        optimizer_state,
        batch,
        state=None,
        frozen=None,
        rate=1.0,
        write_penalty=0.0,
        write_shift=0.0,
        write_loss=0.0,
    ):
        batch = batch.replace(weights=_shares(batch.weights))
        labelled = 0 if batch.wanted is None else jnp.sum(batch.wanted >= 0)
        write = write_penalty, write_shift, write_loss / jnp.maximum(labelled * layers, 1)
        gradients, (scores, finite, memories) = gradient(params, frozen, write, batch, state)
        norm = optax.global_norm(gradients)
        sound = jnp.isfinite(scores.loss) & jnp.isfinite(norm)
        updates, new_state = optimizer.update(gradients, optimizer_state, params)
        updates = jax.tree.map(lambda x: jnp.where(sound, rate * x, 0), updates)
        new_state = jax.tree.map(
            lambda new, old: jnp.where(sound, new, old), new_state, optimizer_state
        )
        metrics = {"loss": scores.loss, "gradient_norm": norm}
        metrics["write_loss"] = scores.write_loss / jnp.maximum(labelled * layers, 1)
        if watch:
            joined = params if frozen is None else join(frozen, params)
            metrics |= _watched(scores, gradients) | {"finite": finite, "memories": memories}
            metrics |= _watched_memory(config, joined, state, memories)
        return optax.apply_updates(params, updates), new_state, metrics

    return train_step


def _shifted(params: Params, write_shift: Float[Array, ""]) -> Params:
    """The parameters with the biases of write gates raised, of rules that have them."""
    return jax.tree.map_with_path(
        lambda path, x: x + write_shift if path[-1].key == WRITE_BIAS else x, params
    )


def _watched(scores: Scores, gradients: Params) -> Metrics:
    return {
        "answer_loss": scores.answer_loss / scores.answer_tokens,
        "answer_accuracy": scores.answer_hits / scores.answer_tokens,
        "answer_tokens": scores.answer_tokens,
        "gradient_norms": {name: optax.global_norm(part) for name, part in gradients.items()},
    }


def _watched_memory(
    config: GemmaConfig, params: Params, before: State | Memories | None, memories: Memories
) -> Metrics:
    rows = _rows(memories)
    layers = inspect(params, start_state(config, rows, memories), config=config)
    found: Metrics = {}
    if layers and all("read" in layer for layer in layers.values()):
        found["read"] = jnp.stack([jnp.mean(jnp.abs(layer["read"])) for layer in layers.values()])
    if shares := written_shares(config, before, memories):
        found["written"] = jnp.stack(shares).mean(axis=(1, 2))
    return found


def written_shares(
    config: GemmaConfig, before: State | Memories | None, memories: Memories
) -> list[Float[Array, "B K"]]:
    """Share of a batch's tokens that was written, by layer that has memory and counts them."""
    if not isinstance(before, State):
        before = start_state(config, _rows(memories), before)
    counted = [i for i, memory in enumerate(memories) if "offered" in memory]
    return [_share_written(before.layers[i].memory, memories[i]) for i in counted]


def _rows(memories: Memories) -> int:
    return jax.tree.leaves(memories)[0].shape[0] if jax.tree.leaves(memories) else 1


def _share_written(before: dict[str, Array], after: dict[str, Array]) -> Array:
    """The memory's own counts go on from text to text."""
    written, offered = (after[name] - before[name] for name in ("written", "offered"))
    return written / jnp.maximum(offered, 1.0)


def _all_finite(tree: Any) -> Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()
