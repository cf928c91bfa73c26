"""`prefill` and `forward` against each other; gradients through memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import all_logits, random_params, random_tokens, tiny_config

import gemma_jax
from gemma_jax.errors import UsageError


@pytest.fixture(scope="module")
def model():
    config = tiny_config(rule="gated_delta")
    return config, random_params(config), random_tokens(config, 2, 37)


@pytest.mark.parametrize("chunk_tokens", [1, 2, 8, 24, None])
def test_prefill_gives_the_last_logits_of_forward(model, chunk_tokens):
    config, params, tokens = model
    expected = all_logits(params, tokens, config)
    logits, state = gemma_jax.prefill(
        params, tokens, gemma_jax.init_state(config, 2), config=config, chunk_tokens=chunk_tokens
    )
    np.testing.assert_allclose(logits, expected[:, -1], rtol=0, atol=1e-4)
    assert logits.dtype == jnp.float32 and state.length.tolist() == [37, 37]


def test_every_row_has_its_own_length(model):
    config, params, tokens = model
    expected = all_logits(params, tokens, config)
    lengths = np.array([37, 11], np.int32)
    logits, state = gemma_jax.prefill(
        params, tokens, gemma_jax.init_state(config, 2), config=config, lengths=lengths
    )
    np.testing.assert_allclose(logits, expected[[0, 1], lengths - 1], rtol=0, atol=1e-4)
    assert state.length.tolist() == lengths.tolist()


def test_a_row_without_tokens_keeps_its_state(model):
    config, params, tokens = model
    _, state = gemma_jax.prefill(params, tokens, gemma_jax.init_state(config, 2), config=config)
    before = jax.tree.map(lambda leaf: np.asarray(leaf[1]), state)
    lengths = np.array([20, 0], np.int32)
    logits, state = gemma_jax.prefill(params, tokens, state, config=config, lengths=lengths)
    assert np.isfinite(logits[0]).all() and np.isnan(logits[1]).all()
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(new[1], old)


def test_forward_is_zero_beyond_the_end(model):
    config, params, tokens = model
    lengths = np.array([30, 5], np.int32)
    hidden, state = gemma_jax.forward(
        params, tokens, gemma_jax.init_state(config, 2), config=config, lengths=lengths
    )
    for b, length in enumerate(lengths):
        assert not hidden[b, length:].any() and hidden[b, :length].any(axis=-1).all()
    assert state.length.tolist() == lengths.tolist()


def test_gradients_reach_through_memory():
    """What was written 20 tokens ago has a gradient; recomputation changes nothing."""
    config = tiny_config(rule="gated_delta", layer_types=("global",), tied_embeddings=False)
    params, tokens = random_params(config), random_tokens(config, 2, 37)
    state = gemma_jax.init_state(config, 2)

    @functools.partial(jax.jit, static_argnums=(1, 2))
    @jax.grad
    def gradient(params, remat, step_tokens):
        hidden, _ = gemma_jax.forward(
            params,
            tokens,
            jax.tree.map(jnp.copy, state),
            config=config,
            remat=remat,
            step_tokens=step_tokens,
        )
        return jnp.mean(gemma_jax.logits(params, hidden[:, -5:], config=config) ** 2)

    first = gradient(params, False, 8)
    for remat, step_tokens in ((True, 8), (False, 40)):
        other = gradient(params, remat, step_tokens)
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True):
            scale = float(jnp.abs(a).max())
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-4 * max(scale, 1e-3))
    for name, found in first["layers_0"]["attention"]["memory"].items():
        assert np.isfinite(found).all() and np.abs(found).max() > 0, name


def test_no_tokens_at_all_are_refused(model):
    config, params, tokens = model
    with pytest.raises(UsageError, match="at least one token"):
        gemma_jax.prefill(params, tokens[:, :0], gemma_jax.init_state(config, 2), config=config)
