"""A model from scratch begins with numbers of the right size, one that exists with its own."""

import dataclasses

import jax
import numpy as np
import pytest
from reference import tiny_config

import gemma_jax
from gemma_jax.errors import UsageError
from gemma_jax.model.adapting import split
from gemma_jax.train import options
from gemma_jax.train.result import write_model
from gemma_jax.train.start import fresh_params, make_model


def config_of(width, rule="selective_delta"):
    config = tiny_config(rule=rule, width=width, mlp_dim=4 * width)
    return dataclasses.replace(config, vocab_size=300)


@pytest.mark.parametrize("width", [32, 256])
def test_branches_are_of_one_size_at_any_width(width):
    config = config_of(width)
    layer = fresh_params(config, jax.random.key(0))["layers_0"]
    x = np.random.default_rng(0).normal(size=(64, width))
    qkv = x @ np.asarray(layer["attention"]["qkv"]).T
    out = np.asarray(layer["attention"]["out"])
    assert 0.9 < qkv.std() < 1.1
    inputs = np.random.default_rng(1).normal(size=(64, out.shape[1]))
    assert 0.8 < (inputs @ out.T).std() * np.sqrt(2 * config.num_layers) < 1.2


@pytest.mark.parametrize(
    "rule, gate", [("selective_delta", 1.0), ("gated_delta", 1.0), ("linear", 0.0)]
)
def test_delta_memories_are_read_from_the_start(rule, gate):
    params = fresh_params(config_of(32, rule), jax.random.key(0))
    np.testing.assert_array_equal(params["layers_0"]["attention"]["memory"]["gate"], gate)


def test_shapes_are_those_of_the_model():
    config = config_of(32)
    shapes = jax.tree.map(lambda x: x.shape, fresh_params(config, jax.random.key(0)))
    assert shapes == jax.tree.map(lambda x: x.shape, gemma_jax.abstract_params(config))


@pytest.fixture(scope="module")
def without_memory(home, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "off"
    config = dataclasses.replace(config_of(32, "off"), vocab_size=2048)
    rng, shapes = np.random.default_rng(0), gemma_jax.abstract_params(config)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), shapes)
    write_model(path, config, params, home, {})
    return path


@pytest.mark.parametrize(
    "rule, write_gate",
    [
        ("off", "sigmoid"),
        ("linear", "hard_sigmoid"),
        ("gated_delta", "sigmoid"),
        ("gated_delta", "hard_sigmoid"),
        ("selective_delta", "sigmoid"),
    ],
)
def test_a_model_without_memory_gets_a_fresh_one_of_the_rule_and_gate_that_are_asked_for(
    without_memory, tmp_path, rule, write_gate
):
    given = ["--model", str(without_memory), "--train", "all", "--memory", rule]
    asked = options.parse([*given, "--write-gate", write_gate])
    config, params, _, _ = make_model(asked, [], tmp_path, lambda *_: None)
    assert (config.memory.rule, config.memory.write_gate) == (rule, write_gate)
    memory, others = split(params, "memory")
    before = gemma_jax.load(without_memory)
    assert config.with_memory(rule="off", write_gate="hard_sigmoid") == before.config
    jax.tree.map(np.testing.assert_array_equal, others, before.params)
    wanted = gemma_jax.abstract_params(config)
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, wanted)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(memory))


def test_slots_are_as_many_as_are_asked_for_and_read_from_the_start(without_memory, tmp_path):
    given = ["--model", str(without_memory), "--train", "all", "--memory", "slots", "--slots", "7"]
    config, params, _, _ = make_model(options.parse(given), [], tmp_path, lambda *_: None)
    assert (config.memory.rule, config.memory.slots) == ("slots", 7)
    np.testing.assert_array_equal(params["layers_0"]["attention"]["memory"]["gate"], 1.0)
    assert gemma_jax.init_state(config).layers[0].memory["key"].shape[2] == 7
    given[given.index("slots")] = "delta"
    with pytest.raises(UsageError, match="delta has no slots: leave out --slots"):
        make_model(options.parse(given), [], tmp_path, lambda *_: None)


def test_neighbours_are_kept_as_far_as_is_asked_for(without_memory, tmp_path):
    given = ["--model", str(without_memory), "--memory", "slots", "--neighbours", "0"]
    config, *_ = make_model(options.parse(given), [], tmp_path, lambda *_: None)
    assert config.memory.neighbours == 0
    given[given.index("slots")] = "delta"
    with pytest.raises(UsageError, match="delta has no slots: leave out --neighbours"):
        make_model(options.parse(given), [], tmp_path, lambda *_: None)


def test_slots_are_not_taken_where_the_rule_of_the_model_has_none(without_memory, tmp_path):
    given = ["--model", str(without_memory), "--slots", "7"]  # its rule would be the default one
    with pytest.raises(UsageError, match="selective_delta has no slots: .*--memory slots"):
        make_model(options.parse(given), [], tmp_path, lambda *_: None)
