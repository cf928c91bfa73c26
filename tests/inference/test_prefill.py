"""`prefill` and `forward` against each other; gradients through memory."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import random_params, random_tokens, tiny_config

import gemma_jax
from gemma_jax.config import PRESETS
from gemma_jax.errors import UsageError
from gemma_jax.inference.pieces import pieces_of
from gemma_jax.inference.prefill import piece_sizes
from gemma_jax.model.scan import room

LENGTH = 37  # four segments of 8, and a part of one


@pytest.fixture(scope="module")
def model():
    config = tiny_config(rule="gated_delta")
    return config, random_params(config), random_tokens(config, 2, LENGTH)


def empty(config, rows=2):
    return gemma_jax.init_state(config, rows)


@pytest.fixture(scope="module")
def whole(model):
    """Logits [2, LENGTH, V] at all positions, and the State behind them."""
    config, params, tokens = model
    hidden, state = gemma_jax.forward(params, tokens, empty(config), config=config)
    return np.asarray(gemma_jax.logits(params, hidden, config=config)), state


def states_agree(found, expected, tolerance=1e-4):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


# Tokens at a time, a part of a segment, whole segments, what does not divide one, and the default.
@pytest.mark.parametrize("chunk_tokens", [1, 2, 3, 8, 12, 24, 1000, None])
def test_prefill_gives_the_last_logits_of_forward(model, whole, chunk_tokens):
    config, params, tokens = model
    expected, after = whole
    logits, state = gemma_jax.prefill(
        params, tokens, empty(config), config=config, chunk_tokens=chunk_tokens
    )
    np.testing.assert_allclose(logits, expected[:, -1], rtol=0, atol=1e-4)
    assert logits.dtype == jnp.float32 and state.length.tolist() == [LENGTH] * 2
    states_agree(state, after)


# A piece is one step or several, of whole segments or parts of one.
@pytest.mark.parametrize("size, chunk_tokens", [(16, None), (24, 8), (3, None), (12, 3), (5, 1000)])
@pytest.mark.parametrize("begin", [0, 5, 8])
def test_pieces_as_large_as_there_is_room_for(model, whole, size, chunk_tokens, begin):
    config, params, tokens = model
    _, state = gemma_jax.forward(
        params, tokens[:1], empty(config, 1), config=config, lengths=np.array([begin])
    )

    def most(given):
        return room(config, begin + given, size, chunk_tokens)

    given = 0
    for piece, count in pieces_of([tokens[0, begin:]], size, config.vocab_size, most):
        assert count == min(most(given), LENGTH - begin - given) and piece.shape == (1, size)
        given += count
        logits, state = gemma_jax.prefill(
            params,
            piece,
            state,
            config=config,
            lengths=np.array([count]),
            chunk_tokens=chunk_tokens,
            fits=True,
        )
    assert given == LENGTH - begin
    np.testing.assert_allclose(logits, whole[0][:1, -1], rtol=0, atol=1e-4)
    states_agree(state, jax.tree.map(lambda leaf: leaf[:1], whole[1]))


@pytest.mark.parametrize("step_tokens", [3, 4, 5, 6, 8, 12, 1000])
@pytest.mark.parametrize("length", [10, 12, 16, 20])
def test_from_the_start_of_a_segment_on(model, length, step_tokens):
    """Steps may end where segments do, or be cut short there."""
    config, params, tokens = model
    found, wanted = (
        gemma_jax.forward(
            params,
            tokens[:, :length],
            empty(config),
            config=config,
            step_tokens=step_tokens,
            aligned=aligned,
        )
        for aligned in (True, False)
    )
    states_agree(found, wanted, tolerance=1e-5)


def test_where_tokens_fit_the_host_need_not_ask_the_device(model):
    config, params, tokens = model
    text = {
        fits: gemma_jax.prefill.lower(
            params, tokens[:, :16], empty(config), config=config, fits=fits
        ).as_text()
        for fits in (False, True)
    }
    assert "stablehlo.case" in text[False] and "stablehlo.case" not in text[True]


@pytest.mark.parametrize("lengths", [(LENGTH, 11), (1, 8), (16, 17)], ids=str)
def test_every_row_has_its_own_length(model, whole, lengths):
    config, params, tokens = model
    lengths = np.array(lengths, np.int32)
    logits, state = gemma_jax.prefill(params, tokens, empty(config), config=config, lengths=lengths)
    np.testing.assert_allclose(logits, whole[0][[0, 1], lengths - 1], rtol=0, atol=1e-4)
    assert state.length.tolist() == lengths.tolist()


def test_what_stands_in_the_padding_does_not_matter(model):
    config, params, tokens = model
    lengths = np.array([20, 5], np.int32)
    other = np.where(np.arange(LENGTH) < lengths[:, None], tokens, (tokens + 1) % config.vocab_size)
    first = gemma_jax.prefill(params, tokens, empty(config), config=config, lengths=lengths)
    second = gemma_jax.prefill(params, other, empty(config), config=config, lengths=lengths)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_row_without_tokens_keeps_its_state(model):
    config, params, tokens = model
    full = np.array([LENGTH] * 2, np.int32)
    _, state = gemma_jax.prefill(params, tokens, empty(config), config=config, lengths=full)
    before = jax.tree.map(lambda leaf: np.asarray(leaf[1]), state)
    lengths = np.array([20, 0], np.int32)
    logits, state = gemma_jax.prefill(params, tokens, state, config=config, lengths=lengths)
    assert np.isfinite(logits[0]).all() and np.isnan(logits[1]).all()
    assert state.length.tolist() == [LENGTH + 20, LENGTH]
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(new[1], old)


def test_reading_then_writing_is_reading_more(model):
    """The State after a text that was written is that of the same text read at once."""
    config, params, tokens = model
    lengths = np.array([20, 6], np.int32)
    start = gemma_jax.prefill(params, tokens, empty(config), config=config, lengths=lengths)
    written, counts, logits, state = gemma_jax.decode_block(
        params,
        *start,
        config=config,
        sampling=gemma_jax.Temperature(3.0),
        key=jax.random.key(0),
        num_tokens=17,
    )
    text = tokens.copy()
    for row, length in enumerate(lengths):
        text[row, length : length + 17] = written[row]
    expected, after = gemma_jax.prefill(
        params, text, empty(config), config=config, lengths=lengths + 17
    )
    assert counts.tolist() == [17, 17]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
    states_agree(state, after)


def test_forward_is_zero_beyond_the_end(model, whole):
    config, params, tokens = model
    lengths = np.array([30, 5], np.int32)
    hidden, state = gemma_jax.forward(params, tokens, empty(config), config=config, lengths=lengths)
    logits = np.asarray(gemma_jax.logits(params, hidden, config=config))
    for b, length in enumerate(lengths):
        assert not hidden[b, length:].any() and hidden[b, :length].any(axis=-1).all()
        np.testing.assert_allclose(logits[b, :length], whole[0][b, :length], rtol=0, atol=1e-4)
    assert state.length.tolist() == lengths.tolist()


def test_gradients_reach_through_memory():
    """What was written 20 tokens ago has a gradient; how it is computed changes nothing."""
    config = tiny_config(rule="gated_delta", layer_types=("global",), tied_embeddings=False)
    params, tokens = random_params(config), random_tokens(config, 2, LENGTH)
    state = empty(config)

    @functools.partial(jax.jit, static_argnames=("remat", "step_tokens"))
    @jax.value_and_grad
    def loss(params, remat, step_tokens):
        hidden, _ = gemma_jax.forward(
            params,
            tokens,
            jax.tree.map(jnp.copy, state),
            config=config,
            remat=remat,
            step_tokens=step_tokens,
        )
        return jnp.mean(gemma_jax.logits(params, hidden[:, -5:], config=config) ** 2)

    step_by_step = functools.partial(loss, remat="steps", step_tokens=8)
    (_, found), (_, other) = step_by_step(params), loss(params, remat=None, step_tokens=40)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(other), strict=True):
        scale = max(float(jnp.abs(a).max()), 1e-3)
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-4 * scale)
    memory = found["layers_0"]["attention"]["memory"]
    for name, gradient in memory.items():
        assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0, name

    def moved(by):  # the loss with every read gate moved
        def move(path, leaf):
            return leaf + by if [part.key for part in path[-2:]] == ["memory", "gate"] else leaf

        return float(step_by_step(jax.tree.map_with_path(move, params))[0])

    slope = (moved(0.01) - moved(-0.01)) / 0.02
    assert slope == pytest.approx(float(memory["gate"].sum()), rel=0.02) and abs(slope) > 1e-3


def test_no_tokens_at_all_are_refused(model):
    config, params, tokens = model
    with pytest.raises(UsageError, match="at least one token"):
        gemma_jax.prefill(params, tokens[:, :0], empty(config), config=config)


@pytest.mark.parametrize(
    "backend, quantization, length, sizes",
    [
        ("gpu", None, 256, (8192, 16_384)),
        ("gpu", "int8", 256, (8192, 8192)),
        ("gpu", None, 24_576, (8192, 8192)),  # of a segment, 16,384 would leave a part
        ("cpu", None, 256, (256, 256)),
    ],
)
def test_pieces_of_long_texts_are_larger_where_there_is_memory(
    monkeypatch, backend, quantization, length, sizes
):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    config = dataclasses.replace(PRESETS["gemma-2b"], quantization=quantization)
    assert piece_sizes(config.with_memory(segment_length=length)) == sizes
