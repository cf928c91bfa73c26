"""A step of training: its loss and gradient are those of the plain formula, and it learns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import random_params, random_tokens, tiny_config

import gemma_jax
from gemma_jax.train.cross_entropy import cross_entropy
from gemma_jax.train.step import Batch, batch_loss, make_optimizer, make_train_step

LENGTH = 32  # four segments


def small(**changes):
    return tiny_config(
        **{"layer_types": ("global",), "final_softcap": 20.0, "rule": "linear"} | changes
    )


loss_and_gradient = jax.jit(
    jax.value_and_grad(batch_loss), static_argnames=("config", "step_tokens", "remat")
)


@pytest.fixture(scope="module")
def config():
    return small()


def make_batch(config, rows=2, seed=0):
    text = random_tokens(config, rows, LENGTH + 1, seed=seed)
    weights = np.random.default_rng(seed).uniform(0, 1, (rows, LENGTH)).astype(np.float32)
    return Batch(text[:, :-1], text[:, 1:], jnp.where(weights > 0.3, weights, 0.0))


@functools.partial(jax.jit, static_argnames="config")
@jax.value_and_grad
def plain_loss(params, batch, config):
    """The formula as it reads, without slices, recomputation or aligned steps."""
    state = gemma_jax.init_state(config, batch.tokens.shape[0])
    hidden, _ = gemma_jax.forward(params, batch.tokens, state, config=config, step_tokens=16)
    logs = jax.nn.log_softmax(gemma_jax.logits(params, hidden, config=config))
    right = jnp.take_along_axis(logs, jnp.asarray(batch.targets)[..., None], axis=-1)[..., 0]
    return -jnp.sum(right * batch.weights) / jnp.sum(batch.weights)


def close(found, wanted, tolerance):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1e-3, np.abs(b).max()))


@pytest.mark.parametrize(
    "rule, step_tokens, remat, tied",
    [
        ("gated_delta", 32, "layers", True),
        ("linear", 16, "steps", False),
        ("linear", 4, None, True),
    ],
)
def test_loss_and_gradient_are_those_of_the_formula(rule, step_tokens, remat, tied):
    config = small(rule=rule, tied_embeddings=tied)
    params, batch = random_params(config), make_batch(config)
    wanted = plain_loss(params, batch, config)
    found = loss_and_gradient(params, batch, config=config, step_tokens=step_tokens, remat=remat)
    assert found[0] == pytest.approx(float(wanted[0]), rel=1e-5)
    close(found[1], wanted[1], 3e-4)
    memory = found[1]["layers_0"]["attention"]["memory"]
    assert all(np.abs(leaf).max() > 0 for leaf in memory.values())


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("rows", [4, 7, 100])
def test_slices_of_the_loss_change_nothing(softcap, rows):
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(12, 6)), rng.normal(size=(9, 6))
    targets, weights = rng.integers(0, 9, 12), rng.uniform(size=12)

    def oracle(hidden, head):  # float64
        scores = hidden @ head.T
        scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
        logs = scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))
        return -(weights * logs[np.arange(12), targets]).sum()

    arrays = [jnp.float32(x) for x in (hidden, head)]
    options = {"weights": jnp.float32(weights), "softcap": softcap, "rows": rows}

    def loss(hidden, head):
        return cross_entropy(hidden, head, targets, **options)[0]

    value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(*arrays)
    assert value == pytest.approx(oracle(hidden, head), rel=1e-5)
    assert loss(*arrays) == pytest.approx(float(value), rel=1e-6)
    for which, gradient in enumerate(gradients):
        for at in ((0, 0), (3, 5), (8, 2)):
            moved = [[hidden.copy(), head.copy()] for _ in range(2)]
            for arrays, by in zip(moved, (1e-5, -1e-5), strict=True):
                arrays[which][at] += by
            slope = (oracle(*moved[0]) - oracle(*moved[1])) / 2e-5
            assert gradient[at] == pytest.approx(slope, rel=1e-4, abs=1e-5)


def test_masked_predictions_have_no_influence(config):
    params, batch = random_params(config), make_batch(config)
    masked = batch.weights == 0
    other = batch.replace(targets=jnp.where(masked, (batch.targets + 1) % 41, batch.targets))
    gradient = functools.partial(loss_and_gradient, config=config)
    assert masked.any()
    close(gradient(params, batch), gradient(params, other), 1e-7)
    nothing = batch.replace(weights=jnp.zeros_like(batch.weights))
    loss, gradients = gradient(params, nothing)
    assert loss == 0 and all(not leaf.any() for leaf in jax.tree.leaves(gradients))


def test_bfloat16_layers_have_float32_gradients_near_the_exact_ones(config):
    params, batch = random_params(config, scale=0.2), make_batch(config)
    half = small(dtype="bfloat16")
    _, wanted = loss_and_gradient(params, batch, config=config)
    _, found = loss_and_gradient(params, batch, config=half)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(found))
    a, b = (jnp.concatenate([x.ravel() for x in jax.tree.leaves(t)]) for t in (found, wanted))
    assert jnp.dot(a, b) / jnp.linalg.norm(a) / jnp.linalg.norm(b) > 0.99


def test_equal_tokens_sum_their_gradients_in_float32():
    """In bfloat16 a sum stops growing after 256 equal terms."""
    config = tiny_config(dtype="bfloat16", layer_types=("global",), tied_embeddings=False)
    params = random_params(config)
    tokens = jnp.zeros((1, 1024), jnp.int32)

    def loss(embedding):
        hidden = gemma_jax.Transformer(config).apply(
            {"params": params | {"embedder": {**params["embedder"], "embedding": embedding}}},
            tokens,
            method=lambda model, tokens: model.embedder.encode(tokens),
        )
        return hidden.astype(jnp.float32).sum()

    gradient = jax.grad(loss)(jnp.zeros((41, 20), jnp.float32))
    np.testing.assert_allclose(gradient[0], 1024 * np.sqrt(20), rtol=1e-2)


def test_a_state_is_continued(config):
    params, batch = random_params(config), make_batch(config)
    both = gemma_jax.init_state(config, 2)
    _, state = gemma_jax.forward(params, batch.tokens[:, :16], both, config=config)
    half = jax.tree.map(lambda leaf: leaf[:, 16:], batch)
    whole = batch.replace(weights=batch.weights.at[:, :16].set(0))
    loss = functools.partial(batch_loss, params, config=config)
    assert loss(half, state) == pytest.approx(float(loss(whole)), rel=1e-5)


def test_steps_lower_the_loss(config):
    params, batch = random_params(config, scale=0.2), make_batch(config)
    optimizer = make_optimizer(1e-2)
    step = make_train_step(config, optimizer)
    state, losses = optimizer.init(params), []
    for _ in range(8):
        params, state, metrics = step(params, state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.7 * losses[0] and float(metrics["gradient_norm"]) > 0


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_penalty_closes_gates_that_write_too_much(accumulate):
    config = small(rule="gated_delta")
    before, batch = random_params(config, scale=0.2), make_batch(config)
    optimizer = make_optimizer(1e-2)
    step = make_train_step(config, optimizer, accumulate=accumulate, watch=True)

    def after(penalty):
        params, state = jax.tree.map(jnp.copy, before), optimizer.init(before)
        for _ in range(6):
            params, state, metrics = step(params, state, batch, write_penalty=penalty)
        return float(metrics["written"][0])

    share, less = after(0.0), after(10.0)
    assert share > 0.3 and less < share - 0.05
    first, _ = loss_and_gradient(before, batch, config=config)
    _, _, metrics = step(
        jax.tree.map(jnp.copy, before), optimizer.init(before), batch, write_penalty=10.0
    )
    assert metrics["loss"] == pytest.approx(
        float(first), rel=1e-5
    )  # it is no part of what is measured


def test_the_penalty_is_the_mean_logarithm_of_the_tokens_written():
    config = small(rule="gated_delta")
    batch = make_batch(config)
    step = make_train_step(config, optax.sgd(1.0))

    def penalty(params):
        state = gemma_jax.init_state(config, 2)
        _, state = gemma_jax.forward(params, batch.tokens, state, config=config)
        written = state.layers[0].memory["written"]  # [rows, heads]; the last segment is not
        share = written / state.layers[0].memory["offered"]
        return jnp.log1p(share * LENGTH).mean()

    def after(penalty):
        return step(
            random_params(config, scale=0.2), optax.sgd(1.0).init(0), batch, write_penalty=penalty
        )[0]

    moved = jax.tree.map(jnp.subtract, after(0.0), after(3.0))
    wanted = jax.tree.map(lambda x: 3.0 * x, jax.grad(penalty)(random_params(config, scale=0.2)))
    close(moved, wanted, 1e-3)
    assert np.abs(wanted["layers_0"]["attention"]["memory"]["write_bias"]).min() > 0.1


def test_a_shift_raises_the_write_gates_of_a_step_alone():
    config = small(rule="gated_delta")
    batch, before = make_batch(config), random_params(config, scale=0.2)
    step = make_train_step(config, optax.sgd(1.0), watch=True)

    def after(raised, **given):
        params = jax.tree.map_with_path(
            lambda path, x: x + raised if path[-1].key == "write_bias" else jnp.copy(x), before
        )
        return step(params, optax.sgd(1.0).init(0), batch, **given)

    shifted, _, metrics = after(0.0, write_shift=1.5)
    raised, _, wanted = after(1.5)
    assert metrics["written"] == pytest.approx(np.asarray(wanted["written"]))
    assert metrics["written"][0] > after(0.0)[2]["written"][0] + 0.1
    biases = [p["layers_0"]["attention"]["memory"]["write_bias"] for p in (shifted, raised)]
    np.testing.assert_allclose(biases[0] + 1.5, biases[1], rtol=1e-5)


def logits_of_keeping(params, tokens, config):
    """[B, T, K] of the first layer, in NumPy."""
    layer = params["layers_0"]
    memory = {name: np.float64(x) for name, x in layer["attention"]["memory"].items()}

    def unit(x, eps):
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps)

    x = np.float64(params["embedder"]["embedding"])[tokens] * config.width**0.5
    x = unit(x, config.norm_eps) * (1 + np.float64(layer["pre_attention_norm"]["scale"]))
    x = unit(x, 1e-6)
    hidden = np.asarray(jax.nn.gelu(x @ memory["hidden_kernel"]))
    return hidden @ memory["score_kernel"] + x @ memory["write_kernel"] + memory["write_bias"]


def test_what_should_be_kept_counts_as_the_mean_of_layers_with_memory():
    config = small(rule="slots", layer_types=("global", "sliding", "global"), sliding_window=16)
    params, batch = random_params(config, scale=0.02), make_batch(config)
    wanted = np.random.default_rng(0).integers(-1, 2, batch.tokens.shape).astype(np.int8)
    state = gemma_jax.init_state(config, 2)
    *_, total = gemma_jax.forward(params, batch.tokens, state, config=config, wanted=wanted)
    step = make_train_step(config, optax.sgd(1.0))
    _, _, metrics = step(params, optax.sgd(1.0).init(0), batch.replace(wanted=wanted))
    assert metrics["write_loss"] == pytest.approx(float(total) / (wanted >= 0).sum() / 2, rel=1e-4)


def test_what_should_be_kept_is_said_of_real_tokens_alone():
    config = small(rule="slots")
    params, batch = random_params(config, scale=0.2), make_batch(config)
    ones, lengths = np.ones(batch.tokens.shape, np.int8), np.array([LENGTH, 13])

    def loss(**given):
        state = gemma_jax.init_state(config, 2)
        return float(gemma_jax.forward(params, batch.tokens, state, config=config, **given)[2])

    said = np.where(np.arange(LENGTH) < lengths[:, None], ones, -ones)
    short = loss(wanted=ones, lengths=lengths)
    assert short == pytest.approx(loss(wanted=said), rel=1e-5) and short < 0.9 * loss(wanted=ones)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_should_be_kept_is_learnt_by_its_cross_entropy(accumulate):
    config = small(rule="slots")
    params, batch = random_params(config, scale=0.2), make_batch(config)
    wanted = np.random.default_rng(0).integers(-1, 2, batch.tokens.shape).astype(np.int8)
    logit = logits_of_keeping(params, batch.tokens, config)
    each = np.logaddexp(0, np.where(wanted[..., None] == 1, -logit, logit)).mean(axis=-1)
    expected = each[wanted >= 0].mean()
    options = {"config": config, "wanted": wanted}
    for step_tokens in (5, 16, 32):
        state = gemma_jax.init_state(config, 2)
        given = options | {"step_tokens": step_tokens}
        *_, loss = gemma_jax.forward(params, batch.tokens, state, **given)
        assert loss / (wanted >= 0).sum() == pytest.approx(expected, rel=1e-4)

    step = make_train_step(config, optax.sgd(1.0), accumulate=accumulate, remat="steps")

    def after(weight):
        given = batch.replace(wanted=wanted), None, None, 1.0, 0.0, 0.0, weight
        copied = jax.tree.map(jnp.copy, params)
        return step(copied, optax.sgd(1.0).init(0), *given)

    def loss(params):
        state = gemma_jax.init_state(config, 2)
        return gemma_jax.forward(params, batch.tokens, state, **options)[2] / (wanted >= 0).sum()

    (plain, _, metrics), (taught, _, _) = after(0.0), after(3.0)
    assert metrics["write_loss"] == pytest.approx(expected, rel=1e-4)
    moved = jax.tree.map(jnp.subtract, plain, taught)
    close(moved, jax.tree.map(lambda x: 3.0 * x, jax.grad(loss)(params)), 1e-3)
    assert np.abs(moved["layers_0"]["attention"]["memory"]["write_kernel"]).max() > 0.01


def test_groups_have_their_learning_rates_and_decay():
    params = jax.tree.map(jnp.ones_like, random_params(small(rule="gated_delta")))
    gradients = jax.tree.map(lambda leaf: 0.001 * jnp.ones_like(leaf), params)
    optimizer = make_optimizer(0.1, lambda step: 0.5, weight_decay=0.01)
    update = jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p))
    updates, _ = update(gradients, params)
    layer = updates["layers_0"]
    # Adam's first step is the gradient's sign; decay is added to it.
    for leaf, wanted in (
        (layer["attention"]["qkv"], -0.1 * 1.01),
        (layer["pre_mlp_norm"]["scale"], -0.1),
        (layer["attention"]["memory"]["gate"], -0.5),
        (layer["attention"]["memory"]["write_kernel"], -0.5),
        (updates["embedder"]["embedding"], -0.1 * 1.01),
    ):
        np.testing.assert_allclose(leaf, wanted, rtol=1e-3)


def test_gradients_are_clipped_by_their_norm():
    params = {"a": jnp.zeros((3, 3)), "b": jnp.zeros(4)}
    gradients = {"a": jnp.full((3, 3), 10.0), "b": jnp.full(4, -10.0)}
    optimizer = make_optimizer(1.0, clip_norm=1.0)
    _, state = optimizer.update(gradients, optimizer.init(params), params)
    moment = optax.tree_utils.tree_get(state, "mu")
    assert optax.global_norm(moment) == pytest.approx(0.1)  # 1 - b1 of a gradient of norm 1
