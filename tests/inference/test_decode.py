"""`decode_block`: greedy text, counts, stops, seeds, and the State it leaves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import FORMS, RULES, NumpyGemma, random_params, random_tokens, tiny_config

import gemma_jax

KEY = jax.random.key(7)
LENGTHS = np.array([13, 6], np.int32)
PADDED = 16


@functools.cache
def model(rule="gated_delta", form=FORMS[0]):
    """Segments of 4 tokens; with this seed greedy texts keep changing, without near-ties."""
    config = tiny_config(
        rule=rule,
        local_attention=form,
        segment_length=4,
        layer_types=("global", "sliding"),
        tied_embeddings=False,  # a tied random model repeats its last token
    )
    return config, random_params(config, seed=7), random_tokens(config, 2, PADDED)


def prompt(rule="gated_delta", form=FORMS[0], rows=slice(0, 2), padding=0):
    """Logits and State after both texts, of 13 and 6 tokens."""
    config, params, tokens = model(rule, form)
    lengths, tokens = LENGTHS[rows], np.pad(tokens[rows], [(0, 0), (0, padding)])
    state = gemma_jax.init_state(config, len(lengths))
    return gemma_jax.prefill(params, tokens, state, config=config, lengths=lengths)


def decode(logits, state, num_tokens, rule="gated_delta", form=FORMS[0], **options):
    config, params, _ = model(rule, form)
    options = {"sampling": gemma_jax.Temperature(2.0), "key": KEY} | options
    return gemma_jax.decode_block(
        params, logits, state, config=config, num_tokens=num_tokens, **options
    )


@functools.cache
def sampled():
    """Twelve tokens of each text, sampled in one block without a stop."""
    return np.asarray(decode(*prompt(), 12)[0])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rule", RULES)
def test_greedy_text_is_the_argmax_of_the_growing_text(rule, form):
    """Each token is what NumPy's model finds likeliest after all that stands before it."""
    config, params, tokens = model(rule, form)
    logits, state = prompt(rule, form)
    found, counts, _, state = decode(logits, state, 15, rule, form, sampling=gemma_jax.Greedy())
    assert counts.tolist() == [15, 15] and found.dtype == jnp.int32
    assert state.length.tolist() == (LENGTHS + 15).tolist()
    for row, length in enumerate(LENGTHS):
        text = np.concatenate([tokens[row, :length], found[row]])
        expected = NumpyGemma(params, config).logits(text).argmax(-1)
        assert found[row].tolist() == expected[length - 1 : -1].tolist()
        assert len(set(found[row].tolist())) > 3  # a text that repeats itself shows nothing


def test_a_row_ends_with_its_stop_and_its_state_with_it():
    """Counts tell how many tokens a row has; State and logits are those after exactly these."""
    config, params, tokens = model()
    free = sampled()
    stop = int(free[0, 4])
    ends = [row.tolist().index(stop) + 1 if stop in row else 12 for row in free]
    assert ends[0] <= 5 and ends[0] != ends[1]
    found, counts, logits, state = decode(*prompt(), 12, stop_ids=(stop, 1000))
    assert counts.tolist() == ends
    assert state.length.tolist() == (LENGTHS + ends).tolist()
    padded = np.zeros((2, PADDED + 12), np.int32)
    for row, end in enumerate(ends):
        assert found[row, :end].tolist() == free[row, :end].tolist()
        assert not found[row, end:].any()
        text = np.concatenate([tokens[row, : LENGTHS[row]], found[row, :end]])
        padded[row, : len(text)] = text
    expected, after = gemma_jax.prefill(
        params,
        padded,
        gemma_jax.init_state(config, 2),
        config=config,
        lengths=LENGTHS + np.array(ends, np.int32),
    )
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)


def test_rows_end_with_whichever_stop_comes_first():
    first, second = (int(token) for token in sampled()[:, 0])
    assert first != second
    _, counts, _, state = decode(*prompt(), 12, stop_ids=(second, first))
    assert counts.tolist() == [1, 1]  # the stop itself counts
    assert state.length.tolist() == (LENGTHS + 1).tolist()


@pytest.mark.parametrize("sizes", [(1,) * 12, (3,) * 4, (8, 4)], ids=str)
def test_blocks_of_any_size_give_the_same_text(sizes):
    (logits, state), pieces = prompt(), []
    for size in sizes:
        tokens, _, logits, state = decode(logits, state, size)
        pieces.append(tokens)
    assert jnp.concatenate(pieces, axis=1).tolist() == sampled().tolist()


def test_a_row_alone_writes_what_it_writes_in_a_batch():
    alone = decode(*prompt(rows=slice(0, 1)), 12)[0]
    assert alone[0].tolist() == sampled()[0].tolist()


def test_seeds():
    again = decode(*prompt(), 12)[0]
    other = decode(*prompt(), 12, key=jax.random.key(8))[0]
    assert again.tolist() == sampled().tolist() != other.tolist()


def test_equal_rows_are_sampled_apart():
    config, params, tokens = model()
    twice = np.repeat(tokens[:1], 2, axis=0)
    state = gemma_jax.init_state(config, 2)
    start = gemma_jax.prefill(params, twice, state, config=config, lengths=LENGTHS[[0, 0]])
    found = decode(*start, 12)[0]
    assert found[0].tolist() == sampled()[0].tolist() != found[1].tolist()


def test_the_state_given_is_consumed():
    logits, state = prompt()
    decode(logits, state, 12)
    for leaf in jax.tree.leaves(state):
        assert leaf.is_deleted()
    assert not logits.is_deleted()


def test_nothing_recompiles_for_another_prompt():
    """Not for another length, another width of the padding, another key or a second block."""
    _, _, logits, state = decode(*prompt(), 12)
    before = gemma_jax.decode_block._cache_size()
    decode(logits, state, 12)
    decode(*prompt(), 12, key=jax.random.key(8))
    found = decode(*prompt(padding=9), 12)[0]
    assert gemma_jax.decode_block._cache_size() == before
    assert found.tolist() == sampled().tolist()  # nor is the text another one

    config, params, tokens = model()
    before = gemma_jax.prefill._cache_size()
    for lengths in ([1, 16], [9, 2]):
        state = gemma_jax.init_state(config, 2)
        lengths = np.array(lengths, np.int32)
        logits, state = gemma_jax.prefill(params, tokens, state, config=config, lengths=lengths)
        decode(logits, state, 12)
    assert gemma_jax.prefill._cache_size() == before


def test_it_can_be_part_of_another_program():
    config = tiny_config()
    params, logits = random_params(config), jnp.zeros((1, config.vocab_size))
    options = {
        "config": config,
        "sampling": gemma_jax.Greedy(),
        "key": jax.random.key(0),
        "num_tokens": 3,
    }

    def block(logits):
        return gemma_jax.decode_block(params, logits, gemma_jax.init_state(config), **options)[0]

    np.testing.assert_array_equal(jax.jit(block)(logits), block(logits))
