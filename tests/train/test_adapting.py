"""What is trained and what is not: parted and joined without loss, and stepped without touching the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import random_params, random_tokens, tiny_config
from teaching import equal_trees

import gemma_jax
from gemma_jax.model import adapting
from gemma_jax.model.memory import make_rule
from gemma_jax.train.step import Batch, batch_loss, make_optimizer, make_train_step

WATCHED = {"answer_loss", "answer_accuracy", "gradient_norms", "finite", "read", "written"}


@pytest.fixture(scope="module")
def config():
    return tiny_config(layer_types=("global",), rule="gated_delta", segment_length=8)


@pytest.fixture(scope="module")
def params(config):
    return random_params(config, scale=0.2)


@pytest.fixture(scope="module")
def batch(config):
    text = random_tokens(config, 4, 33)
    answers = np.zeros((4, 32), bool)
    answers[:, 20:24] = True
    return Batch(text[:, :-1], text[:, 1:], np.ones((4, 32), np.float32), answers)


@pytest.fixture(scope="module")
def optimizer():
    return make_optimizer(0.01)


@pytest.fixture(scope="module")
def take_step(config, params, optimizer):
    """One step of all parameters: what they and the optimiser's state become, and what was seen."""
    step = make_train_step(config, optimizer, watch=True)

    def take(batch, memories):
        copy = jax.tree.map(jnp.copy, params)
        return step(copy, optimizer.init(copy), batch, memories)

    return take


def remembered(config, rows, scale=1.0):
    """Memories of the model's only layer, of random content."""
    rng = np.random.default_rng(0)
    empty = make_rule(config).init(rows)
    return ({k: jnp.float32(scale * rng.normal(size=leaf.shape)) for k, leaf in empty.items()},)


def names(tree):
    return {"/".join(part.key for part in path) for path, _ in jax.tree.leaves_with_path(tree)}


@pytest.mark.parametrize("what", adapting.WHAT)
def test_a_model_parted_and_joined_is_the_same(params, what):
    trained, frozen = adapting.split(params, what, rank=3, key=jax.random.key(0))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(trained))
    assert equal_trees(adapting.join(frozen, trained), params)
    memory = {name for name in names(params) if "/memory/" in name}
    if what == "all":
        assert frozen == {} and names(trained) == names(params)
    else:
        assert names(frozen) == names(params) - memory and memory <= names(trained)
    matrices = ("qkv", "out", "gate_up", "down")
    added = {name.split("/")[-2] for name in names(trained) - names(params)}
    assert added == ({f"{matrix}_lora" for matrix in matrices} if what == "lora" else set())


def test_an_update_is_added_to_its_matrix(params):
    trained, frozen = adapting.split(params, "lora", rank=3, key=jax.random.key(0))
    update = trained["layers_0"]["mlp"]["down_lora"]
    update["b"] = jax.random.normal(jax.random.key(1), update["b"].shape)
    wanted = np.float64(frozen["layers_0"]["mlp"]["down"])
    wanted = wanted + np.float64(update["b"]) @ np.float64(update["a"])
    joined = adapting.join(frozen, trained)["layers_0"]["mlp"]["down"]
    np.testing.assert_allclose(joined, wanted, rtol=1e-5, atol=1e-6)
    assert update["a"].shape[0] == 3 and float(jnp.abs(update["a"]).max()) > 0


def test_a_scaled_update_is_between_the_model_as_it_was_and_as_it_was_tuned(params):
    """What else was trained stays; nothing given is changed."""
    trained, frozen = adapting.split(params, "lora", rank=2, key=jax.random.key(0))
    update = trained["layers_0"]["attention"]["qkv_lora"]
    update["b"] = jax.random.normal(jax.random.key(1), update["b"].shape)
    tuned, half = (adapting.join(frozen, adapting.scaled(trained, f)) for f in (1.0, 0.5))
    before, middle, after = (
        np.float64(p["layers_0"]["attention"]["qkv"]) for p in (params, half, tuned)
    )
    assert np.abs(after - before).max() > 0.1
    np.testing.assert_allclose(middle, (before + after) / 2, rtol=1e-5, atol=1e-6)
    for one, other in ((half, params), (adapting.join(frozen, trained), tuned)):
        np.testing.assert_array_equal(
            one["layers_0"]["attention"]["memory"]["gate"],
            other["layers_0"]["attention"]["memory"]["gate"],
        )


def test_updates_differ_from_matrix_to_matrix(params):
    trained, _ = adapting.split(params, "lora", rank=2, key=jax.random.key(0))
    layer = trained["layers_0"]
    qkv, gate_up = layer["attention"]["qkv_lora"]["a"], layer["mlp"]["gate_up_lora"]["a"]
    assert qkv.shape == gate_up.shape and not np.array_equal(qkv, gate_up)


def test_only_what_is_trained_has_a_gradient_and_an_optimiser_state(config, params, batch):
    trained, frozen = adapting.split(params, "lora", rank=2, key=jax.random.key(0))
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), frozen)
    kept = jax.tree.map(np.asarray, half)
    optimizer = make_optimizer(0.01, 0.1)
    state = optimizer.init(trained)
    sizes = [leaf.size for leaf in jax.tree.leaves(state)]
    count = sum(leaf.size for leaf in jax.tree.leaves(trained))
    assert sum(sizes) < 2 * count + 10
    step = make_train_step(config, optimizer, watch=True)
    before = jax.tree.map(np.asarray, trained)
    trained, state, _ = step(trained, state, batch, None, half)
    gates = jnp.abs(trained["layers_0"]["attention"]["memory"]["gate"]).mean()
    trained, state, metrics = step(trained, state, batch, None, half)
    assert metrics["read"][0] == pytest.approx(float(gates))
    assert equal_trees(half, kept)
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), before, trained)
    assert all(jax.tree.leaves(moved))
    assert WATCHED <= set(metrics) and set(metrics["gradient_norms"]) == {"layers_0"}
    assert 0 < metrics["written"][0] < 1 and metrics["finite"].all()


def test_parts_one_after_another_are_one_batch(config, params, optimizer, batch, take_step):
    memories = remembered(config, 4)
    whole = take_step(batch, memories)
    in_parts = make_train_step(config, optimizer, accumulate=2, watch=True)
    copy = jax.tree.map(jnp.copy, params)
    found = in_parts(copy, optimizer.init(copy), batch, memories)
    for name in ("loss", "gradient_norm", "answer_loss", "written", "memories"):
        for one, other in zip(
            jax.tree.leaves(whole[2][name]), jax.tree.leaves(found[2][name]), strict=True
        ):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5, err_msg=name)


def test_a_kept_memory_is_read_by_a_text_that_begins(config, params, batch, take_step):
    plain = batch_loss(params, batch, config=config)
    losses = [take_step(batch, remembered(config, 4, scale))[2]["loss"] for scale in (0.0, 1.0)]
    assert losses[0] == pytest.approx(float(plain), rel=1e-6)
    assert abs(float(losses[1] - plain)) > 1e-4


def test_a_step_that_is_not_finite_changes_nothing(config, params, optimizer, batch, take_step):
    weights = np.array(batch.weights)
    weights[0, 0] = np.inf
    after, state, metrics = take_step(batch.replace(weights=weights), remembered(config, 4))
    assert not np.isfinite(metrics["loss"])
    assert equal_trees(after, params) and equal_trees(state, optimizer.init(params))


def test_answers_are_measured_apart(config, params, batch, take_step):
    state = gemma_jax.init_state(config, 4)
    hidden, _ = gemma_jax.forward(params, batch.tokens, state, config=config)
    logits = np.asarray(gemma_jax.logits(params, hidden, config=config))
    logs = np.asarray(jax.nn.log_softmax(logits))
    right = np.take_along_axis(logs, batch.targets[..., None], axis=-1)[..., 0]
    hits = logits.argmax(axis=-1) == batch.targets
    _, _, metrics = take_step(batch, remembered(config, 4, 0.0))
    assert metrics["answer_tokens"] == 16
    assert metrics["answer_loss"] == pytest.approx(-right[batch.answers].mean(), rel=1e-4)
    assert metrics["answer_accuracy"] == pytest.approx(hits[batch.answers].mean())
    assert metrics["loss"] == pytest.approx(-right.mean(), rel=1e-4)
