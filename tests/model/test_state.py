"""One State for everything: any split, any batch, any position; its size never changes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
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
from gemma_jax.model.state import state_bytes

LENGTH = 64
PADDED = 24  # calls of the split tests have one shape, and lengths of their own


def states_agree(found, expected, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        scale = max(1.0, float(jnp.abs(b).max()))
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale)


def read_in_pieces(params, rows, cuts, config, chunk_tokens=None):
    """Reads rows [B, T], row b in pieces of lengths cuts[b]; returns logits and State."""
    state, at = gemma_jax.init_state(config, len(rows)), np.zeros(len(rows), int)
    last = np.zeros((len(rows), config.vocab_size), np.float32)
    for i in range(max(map(len, cuts))):
        lengths = np.array([row[i] if i < len(row) else 0 for row in cuts], np.int32)
        piece = np.full((len(rows), PADDED), config.vocab_size - 1, np.int32)  # padding is not zero
        for b, count in enumerate(lengths):
            piece[b, :count] = rows[b, at[b] : at[b] + count]
        logits, state = gemma_jax.prefill(
            params, piece, state, config=config, lengths=lengths, chunk_tokens=chunk_tokens
        )
        last = np.where(lengths[:, None] > 0, logits, last)
        at += lengths
    return last, state


@functools.cache
def read_at_once(rule, form):
    config = tiny_config(rule=rule, local_attention=form)
    params, tokens = random_params(config), random_tokens(config, 2, LENGTH)
    state = gemma_jax.init_state(config, 2)
    logits, state = gemma_jax.prefill(params, tokens, state, config=config, chunk_tokens=LENGTH)
    return config, params, tokens, logits, state


@st.composite
def splits(draw):
    cuts, left = [], LENGTH
    while left:
        cuts.append(draw(st.integers(1, min(left, PADDED))))
        left -= cuts[-1]
    return cuts


@pytest.mark.parametrize("chunk_tokens", [4, 16])
@pytest.mark.parametrize(
    "rule, form", [("gated_delta", FORMS[0]), ("delta", FORMS[1]), ("slots", FORMS[0])]
)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(cuts=st.tuples(splits(), splits()))
def test_any_split_is_the_same(rule, form, chunk_tokens, cuts):
    config, params, tokens, logits, state = read_at_once(rule, form)
    found, split = read_in_pieces(params, tokens, cuts, config, chunk_tokens)
    np.testing.assert_allclose(found, logits, rtol=0, atol=1e-5 * np.abs(logits).max())
    states_agree(split, state)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rule", RULES)
def test_reading_and_writing_agree(rule, form):
    """Prefill, then one token at a time, equals one longer prefill."""
    config, params, tokens, logits, state = read_at_once(rule, form)
    _, decoded = read_in_pieces(params, tokens, [[21], [13]], config)
    step = functools.partial(gemma_jax.decode_block, sampling=Forced(), key=jax.random.key(0))
    for at in range(21, LENGTH):  # the rows are at different places; the second one runs behind
        wanted = jax.nn.one_hot(jnp.array([tokens[0, at], tokens[1, at - 8]]), config.vocab_size)
        _, counts, found, decoded = step(params, wanted, decoded, config=config, num_tokens=1)
    assert counts.tolist() == [1, 1] and decoded.length.tolist() == [LENGTH, LENGTH - 8]
    np.testing.assert_allclose(found[0], logits[0], rtol=0, atol=1e-5 * np.abs(logits).max())
    row = jax.tree.map(lambda leaf: leaf[:1], decoded)
    states_agree(row, jax.tree.map(lambda leaf: leaf[:1], state))


class Forced:
    """Takes the token whose logit is largest."""

    def __call__(self, logits):
        return jnp.where(logits == logits.max(-1, keepdims=True), 0.0, -jnp.inf)

    def __hash__(self):
        return 1

    def __eq__(self, other):
        return isinstance(other, Forced)


def test_rows_of_a_batch_do_not_know_of_each_other():
    config, params, tokens, _, _ = read_at_once("gated_delta", FORMS[0])
    lengths = [[7, 24, 20], [16, 3]]
    together, state = read_in_pieces(params, tokens, lengths, config)
    for b, cuts in enumerate(lengths):
        alone, state_alone = read_in_pieces(params, tokens[b : b + 1], [cuts], config)
        np.testing.assert_allclose(together[b], alone[0], rtol=0, atol=1e-5)
        states_agree(jax.tree.map(lambda leaf, b=b: leaf[b : b + 1], state), state_alone)


@pytest.mark.parametrize("rule", RULES)
def test_nothing_depends_on_how_much_was_read(rule):
    """The counter raised by 8 million: bit-identical logits, and the same State beside it."""
    config, params, tokens, _, state = read_at_once(rule, FORMS[0])
    far = state.replace(length=state.length + 8_000_000)
    near = jax.tree.map(jnp.copy, state)
    near_logits, near = gemma_jax.prefill(params, tokens, near, config=config)
    far_logits, far = gemma_jax.prefill(params, tokens, jax.tree.map(jnp.copy, far), config=config)
    np.testing.assert_array_equal(near_logits, far_logits)
    assert (far.length - near.length).tolist() == [8_000_000] * 2
    for a, b in zip(jax.tree.leaves(near.layers), jax.tree.leaves(far.layers), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_count_of_past_tokens_stops_where_it_no_longer_matters():
    config = tiny_config(sliding_window=5)
    params, tokens = random_params(config), random_tokens(config, 1, 200)
    state = gemma_jax.init_state(config)
    past = []
    for piece in np.split(tokens, 5, axis=1):
        _, state = gemma_jax.prefill(params, piece, state, config=config)
        past.append(int(state.past[0]))
    assert past[-1] == past[-2] < 100 and int(state.length[0]) == 200


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rule", RULES)
def test_state_has_one_size(rule, form):
    config, _, _, _, state = read_at_once(rule, form)
    empty = gemma_jax.init_state(config, 2)
    assert jax.tree.structure(empty) == jax.tree.structure(state)
    shapes = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state)]
    assert shapes == [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(empty)]
    assert state_bytes(config, 2) == sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    kinds = zip(config.layer_types, state.layers, strict=True)
    for kind, layer in kinds:
        assert bool(layer.memory) == (kind == "global" and rule != "off")
        assert all(array.dtype == jnp.float32 for array in layer.memory.values())
        assert (layer.sink_key is not None) == (kind == "global")


def test_peak_memory_does_not_grow_with_the_text():
    """What the compiled program needs beside its arguments and results, for texts of 1 and 64 steps."""
    config = tiny_config(rule="gated_delta", segment_length=16)
    params = gemma_jax.abstract_params(config)
    state = jax.eval_shape(lambda: gemma_jax.init_state(config))

    def scratch(length):
        tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
        compiled = gemma_jax.prefill.lower(
            params, tokens, state, config=config, chunk_tokens=64
        ).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = scratch(256), scratch(64 * 256)
    assert long - short < 8 * 64 * 256 + 4096  # the tokens themselves, and their indices


def test_a_state_begins_on_the_default_device():
    with jax.default_device("cpu"):  # a name, as JAX_DEFAULT_DEVICE gives it
        assert gemma_jax.init_state(tiny_config()).length.devices() == {jax.devices("cpu")[0]}


def test_the_state_given_is_consumed():
    config, params, tokens, _, _ = read_at_once("gated_delta", FORMS[0])
    state = gemma_jax.init_state(config, 2)
    gemma_jax.prefill(params, tokens, state, config=config, chunk_tokens=LENGTH)
    with pytest.raises(RuntimeError, match="deleted"):
        np.asarray(state.layers[0].keys)


@pytest.mark.parametrize("rule", RULES)
def test_fifty_thousand_tokens_are_read_whole(rule):
    """A few of the first 1,000 tokens change the end; memory equals the loop over all tokens."""
    config = tiny_config(
        rule=rule, layer_types=("global",), segment_length=512, width=12, mlp_dim=8
    )
    params, tokens = random_params(config), random_tokens(config, 50_000)
    if rule == "slots":  # the sum of scores that are neither 0 nor 1 tells of every token
        memory = params["layers_0"]["attention"]["memory"]
        memory |= {name: 0.05 * memory[name] for name in ("score_kernel", "write_kernel")}
        params["layers_0"]["attention"]["memory"] = memory
    if rule.endswith("_delta"):  # a gate that often closes: what it wrote must last
        bias = params["layers_0"]["attention"]["memory"]["write_bias"]
        params["layers_0"]["attention"]["memory"]["write_bias"] = bias - 2.0

    def final(tokens):
        state = gemma_jax.init_state(config)
        for piece in np.split(tokens, 5):
            _, state = gemma_jax.prefill(
                params, piece[None], state, config=config, chunk_tokens=1024
            )
        return state

    state, changed = final(tokens), tokens.copy()
    # Without memory only the sink is known for ever.
    at = slice(0, 1) if rule == "off" else slice(700, 720)
    changed[at] = (changed[at] + 1) % config.vocab_size
    other = final(changed)
    differs = [
        not np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True)
    ]
    assert any(differs)
    if rule != "off":
        expected = NumpyGemma(params, config).read_memory(tokens)
        for name, array in expected.items():
            found = state.layers[0].memory[name][0]
            np.testing.assert_allclose(found, array, rtol=0, atol=2e-4 * np.abs(array).max())


def test_a_batch_of_texts_is_read_as_each_alone():
    config = tiny_config()
    params, tokens = random_params(config), random_tokens(config, 3, 30)
    together = all_logits(params, tokens, config)
    for b in range(3):
        alone = all_logits(params, tokens[b : b + 1], config)[0]
        np.testing.assert_allclose(together[b], alone, rtol=0, atol=1e-5)
