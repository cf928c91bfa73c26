"""The whole model against the same written in NumPy: local attention, sink and every memory rule."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import (
    FORMS,
    RULES,
    NumpyGemma,
    all_logits,
    random_params,
    random_tokens,
    tiny_config,
)

import gemma_jax

LENGTH = 61  # several segments of 8, and a part of one


def close(found, expected, tolerance=2e-5):
    scale = max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rule", RULES)
def test_logits_and_memory_equal_numpy(rule, form):
    config = tiny_config(rule=rule, local_attention=form)
    params, tokens = random_params(config), random_tokens(config, LENGTH)
    expected = NumpyGemma(params, config)
    logits = expected.logits(tokens)
    assert logits.std() > 1

    state = gemma_jax.init_state(config)
    hidden, state = gemma_jax.forward(params, tokens[None], state, config=config)
    close(gemma_jax.logits(params, hidden[0], config=config), logits)
    for layer, memory in expected.memories.items():
        for name, array in memory.items():
            close(state.layers[layer].memory[name][0], array)
    if rule != "off":
        assert all(array.any() for m in expected.memories.values() for array in m.values())


@pytest.mark.parametrize(
    "changes",
    [
        {"sink": False},
        {"write_gate": "sigmoid", "rule": "gated_delta"},
        {"attention_softcap": 3.0, "final_softcap": 8.0, "qk_norm": False},
        {"post_norms": False, "tied_embeddings": False, "num_kv_heads": 4},
        {"num_kv_heads": 1, "sliding_window": 70, "segment_length": 7},
        {"segment_length": 1, "rule": "linear"},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_other_settings_equal_numpy(changes):
    config = tiny_config(**changes)
    params, tokens = random_params(config), random_tokens(config, LENGTH)
    close(all_logits(params, tokens[None], config)[0], NumpyGemma(params, config).logits(tokens))


@pytest.mark.parametrize("form", FORMS)
def test_within_reach_local_attention_is_full_attention(form):
    """The sink must not count twice while the first token is still visible."""
    config = tiny_config(local_attention=form)
    params, tokens = random_params(config), random_tokens(config, 1, config.memory.reach + 1)
    full = all_logits(params, tokens, config.with_memory(segment_length=64))
    local = all_logits(params, tokens, config)
    close(local[:, : config.memory.reach], full[:, : config.memory.reach], 1e-6)
    assert np.abs(local[:, -1] - full[:, -1]).max() > 1e-3


def test_the_sink_is_seen_from_afar():
    config = tiny_config(layer_types=("global",))  # one layer: nothing else carries it on
    params, tokens = random_params(config), random_tokens(config, 2, LENGTH)
    tokens[1] = tokens[0]
    tokens[1, 0] = (tokens[0, 0] + 1) % config.vocab_size
    with_sink = all_logits(params, tokens, config)[:, -1]
    without = all_logits(params, tokens, config.with_memory(sink=False))[:, -1]
    assert np.abs(with_sink[0] - with_sink[1]).max() > 1e-3
    np.testing.assert_array_equal(without[0], without[1])


@pytest.mark.parametrize("rule", ["gated_delta", "selective_delta"])
def test_an_untrained_delta_memory_is_a_no_op_with_live_gradients(rule):
    config = tiny_config(rule=rule)
    params, tokens = gemma_jax.init_params(config, jax.random.key(0)), random_tokens(config, 1, 30)
    off = config.with_memory(rule="off")
    np.testing.assert_array_equal(
        all_logits(params, tokens, config), all_logits(params, tokens, off)
    )

    def loss(params):
        hidden, _ = gemma_jax.forward(params, tokens, gemma_jax.init_state(config), config=config)
        return jnp.sum(gemma_jax.logits(params, hidden, config=config)[..., 0])

    gate = jax.grad(loss)(params)["layers_0"]["attention"]["memory"]["gate"]
    assert np.isfinite(gate).all() and np.abs(gate).min() > 0


@pytest.mark.parametrize("rule", [rule for rule in RULES[1:] if rule != "slots"])
def test_every_early_token_changes_the_state(rule):
    """Nothing is truncated: each of the first tokens is known at the end of a long text."""
    config = tiny_config(rule=rule, layer_types=("global",))
    params, tokens = random_params(config), random_tokens(config, 1, LENGTH)

    def final(tokens):
        state = gemma_jax.init_state(config, len(tokens))
        return gemma_jax.prefill(params, tokens, state, config=config)[1]

    at = np.arange(1, 40)
    changed = np.repeat(tokens, len(at), axis=0)
    changed[np.arange(len(at)), at] = (changed[np.arange(len(at)), at] + 1) % config.vocab_size
    original, changed = final(tokens), final(changed)
    found, expected = (np.asarray(s.layers[0].memory["M"]) for s in (changed, original))
    assert (np.abs(found - expected).max(axis=(1, 2, 3)) > 0).all()


def test_axes_are_named_for_every_parameter_and_field():
    config = tiny_config(rule="gated_delta", tied_embeddings=False)
    shapes, axes = gemma_jax.abstract_params(config), gemma_jax.param_axes(config)
    named = jax.tree.leaves(axes, is_leaf=lambda leaf: isinstance(leaf, jax.sharding.PartitionSpec))
    assert [len(names) for names in named] == [leaf.ndim for leaf in jax.tree.leaves(shapes)]
    for kind in (gemma_jax.State, type(gemma_jax.init_state(config).layers[0])):
        for field in dataclasses.fields(kind):
            assert field.name == "layers" or field.metadata["axes"]
