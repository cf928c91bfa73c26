"""`decode_block`: greedy text, counts, stops, seeds, and the State it leaves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import FORMS, RULES, all_logits, random_params, random_tokens, tiny_config

import gemma_jax

KEY = jax.random.key(7)
LENGTHS = np.array([13, 6], np.int32)


@functools.cache
def model(rule="gated_delta", form=FORMS[0]):
    config = tiny_config(
        rule=rule,
        local_attention=form,
        segment_length=4,
        layer_types=("global",),
        tied_embeddings=False,  # a tied random model repeats its last token
    )
    return config, random_params(config), random_tokens(config, 2, 16)


def prompt(rule="gated_delta", form=FORMS[0], rows=slice(0, 2)):
    config, params, tokens = model(rule, form)
    state = gemma_jax.init_state(config, len(LENGTHS[rows]))
    return gemma_jax.prefill(params, tokens[rows], state, config=config, lengths=LENGTHS[rows])


def decode(logits, state, num_tokens, rule="gated_delta", form=FORMS[0], **options):
    config, params, _ = model(rule, form)
    options = {"sampling": gemma_jax.Temperature(2.0), "key": KEY} | options
    return gemma_jax.decode_block(
        params, logits, state, config=config, num_tokens=num_tokens, **options
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rule", RULES)
def test_greedy_text_is_the_argmax_of_the_growing_text(rule, form):
    config, params, tokens = model(rule, form)
    logits, state = prompt(rule, form)
    found, counts, _, state = decode(logits, state, 15, rule, form, sampling=gemma_jax.Greedy())
    assert counts.tolist() == [15, 15] and found.dtype == jnp.int32
    assert state.length.tolist() == (LENGTHS + 15).tolist()
    for row, length in enumerate(LENGTHS):
        text = np.concatenate([tokens[row, :length], found[row]])
        text = np.pad(text, (0, 31 - len(text)))
        expected = all_logits(params, text[None], config)[0].argmax(-1)
        assert found[row].tolist() == expected[length - 1 : length + 14].tolist()


def test_a_row_ends_with_its_stop_and_its_state_with_it():
    """Counts tell how many tokens a row has; State and logits are those after exactly these."""
    config, params, tokens = model()
    free = decode(*prompt(), 12)[0]
    stop = int(free[0, 4])
    ends = [row.tolist().index(stop) + 1 if stop in row else 12 for row in np.asarray(free)]
    assert ends[0] <= 5 and ends[0] != ends[1]
    found, counts, logits, state = decode(*prompt(), 12, stop_ids=(stop, 1000))
    assert counts.tolist() == ends
    assert state.length.tolist() == (LENGTHS + ends).tolist()
    for row, end in enumerate(ends):
        assert found[row, :end].tolist() == free[row, :end].tolist()
        assert not found[row, end:].any()
        text = np.concatenate([tokens[row, : LENGTHS[row]], found[row, :end]])
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(text)] = text
        lengths = np.array([len(text)], np.int32)
        expected, after = gemma_jax.prefill(
            params, padded, gemma_jax.init_state(config), config=config, lengths=lengths
        )
        np.testing.assert_allclose(logits[row], expected[0], rtol=0, atol=1e-4)
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
            np.testing.assert_allclose(a[row], b[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("sizes", [(1,) * 12, (3,) * 4, (5, 7)], ids=str)
def test_blocks_of_any_size_give_the_same_text(sizes):
    expected = decode(*prompt(), 12)[0]
    (logits, state), pieces = prompt(), []
    for size in sizes:
        tokens, _, logits, state = decode(logits, state, size)
        pieces.append(tokens)
    assert jnp.concatenate(pieces, axis=1).tolist() == expected.tolist()


def test_a_row_alone_writes_what_it_writes_in_a_batch():
    together = decode(*prompt(), 12)[0]
    alone = decode(*prompt(rows=slice(0, 1)), 12)[0]
    assert alone[0].tolist() == together[0].tolist()


def test_seeds():
    first, again = decode(*prompt(), 12)[0], decode(*prompt(), 12)[0]
    other = decode(*prompt(), 12, key=jax.random.key(8))[0]
    assert first.tolist() == again.tolist() != other.tolist()


def test_equal_rows_are_sampled_apart():
    config, params, tokens = model()
    twice = np.repeat(tokens[:1], 2, axis=0)
    state = gemma_jax.init_state(config, 2)
    start = gemma_jax.prefill(params, twice, state, config=config)
    found = decode(*start, 12)[0]
    assert found[0].tolist() != found[1].tolist()


def test_state_is_consumed_and_nothing_recompiles():
    logits, state = prompt()
    before = gemma_jax.decode_block._cache_size()
    _, _, logits, after = decode(logits, state, 12)
    with pytest.raises(RuntimeError, match="deleted"):
        np.asarray(state.layers[0].keys)
    decode(logits, after, 12)
    decode(*prompt(), 12)
    assert gemma_jax.decode_block._cache_size() <= before + 1
