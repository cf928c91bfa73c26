"""Sampling strategies against plain NumPy, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax.errors import UsageError
from gemma_jax.inference.sampling import (
    Chain,
    Greedy,
    MinP,
    Temperature,
    TopK,
    TopP,
    draw,
    make_sampling,
)

LOGITS = np.log(np.array([[0.05, 0.4, 0.3, 0.05, 0.2], [0.2, 0.2, 0.2, 0.2, 0.2]], np.float32))
FLAT = [0, 1, 2, 3, 4]


def kept(strategy, logits=LOGITS):
    found = np.asarray(strategy(jnp.asarray(logits)))
    assert found.shape == logits.shape
    return [np.flatnonzero(np.isfinite(row)).tolist() for row in found]


@pytest.mark.parametrize(
    "strategy, expected",
    [
        (Greedy(), [[1], [0]]),
        (TopK(1), [[1], FLAT]),  # ties with the last are kept
        (TopK(2), [[1, 2], FLAT]),
        (TopK(4), [FLAT, FLAT]),
        (TopK(99), [FLAT, FLAT]),
        (TopP(0.39), [[1], FLAT]),
        (TopP(0.41), [[1, 2], FLAT]),
        (TopP(0.85), [[1, 2, 4], FLAT]),
        (TopP(1.0), [FLAT, FLAT]),
        (MinP(0.0), [FLAT, FLAT]),
        (MinP(0.49), [[1, 2, 4], FLAT]),
        (MinP(1.0), [[1], FLAT]),
        (Chain(()), [FLAT, FLAT]),
        (Chain((TopK(3), TopP(0.5))), [[1, 2], FLAT]),
        (Chain((Temperature(0.1), MinP(0.3))), [[1], FLAT]),  # in this order
        (Chain((MinP(0.3), Temperature(0.1))), [[1, 2, 4], FLAT]),
    ],
    ids=str,
)
def test_which_tokens_are_left(strategy, expected):
    assert kept(strategy) == expected


def test_temperature_divides():
    best = LOGITS.max(axis=-1, keepdims=True)
    found = Temperature(0.5)(jnp.asarray(LOGITS))
    np.testing.assert_allclose(found, (LOGITS - best) / 0.5, rtol=1e-6)
    assert np.isfinite(Temperature(1e-6)(jnp.asarray(LOGITS))).all()


def softmax(row):
    weights = np.exp(row.astype(np.float64) - row.max())
    return weights / weights.sum()


def left_by_greedy(row):
    return {int(np.argmax(row))}


def left_by_top_k(row, k):
    last = sorted(row, reverse=True)[min(k, len(row)) - 1]
    return {i for i, logit in enumerate(row) if logit >= last and logit > -np.inf}


def left_by_top_p(row, p):
    probabilities, total = softmax(row), 0.0
    for i in sorted(range(len(row)), key=lambda i: -row[i]):
        last, total = row[i], total + probabilities[i]
        if total >= p:
            break
    return {i for i, logit in enumerate(row) if logit >= last and logit > -np.inf}


def left_by_min_p(row, p):
    probabilities = softmax(row)
    return {
        i
        for i in range(len(row))
        if row[i] > -np.inf and probabilities[i] >= p * probabilities.max()
    }


@pytest.fixture(scope="module")
def rows():
    """Logits [30, 50]: ties among them, and tokens that are out already."""
    rng = np.random.default_rng(0)
    rows = rng.normal(0, 2, (30, 50)).astype(np.float32)
    rows[10:20] = np.round(rows[10:20])
    rows[::3, rng.permutation(50)[:20]] = -np.inf
    rows[-1] = np.where(np.arange(50) == 7, 0.0, -np.inf)  # one is left
    return rows


@pytest.mark.parametrize(
    "strategy, oracle, options",
    [
        (Greedy, left_by_greedy, ()),
        *[(TopK, left_by_top_k, (k,)) for k in (1, 2, 7, 49, 50, 51, 10_000)],
        *[(TopP, left_by_top_p, (p,)) for p in (1e-6, 0.1, 0.5, 0.9, 0.999, 1.0)],
        *[(MinP, left_by_min_p, (p,)) for p in (0.0, 0.01, 0.3, 0.999)],
    ],
)
def test_strategies_equal_plain_numpy(rows, strategy, oracle, options):
    found = np.asarray(strategy(*options)(jnp.asarray(rows)))
    for row, logits in zip(rows, found, strict=True):
        assert set(np.flatnonzero(logits > -np.inf).tolist()) == oracle(row, *options)
        left = logits > -np.inf
        np.testing.assert_array_equal(logits[left], row[left])  # what is left is as it was


def test_top_p_of_one_leaves_everything():
    """Also what is so unlikely that the probabilities before it sum to 1 in float32."""
    logits = np.array([[0.0, -20.0, -60.0, -np.inf]], np.float32)
    assert kept(TopP(1.0), logits) == [[0, 1, 2]]


@pytest.mark.parametrize("p", [0.25, 0.5, 0.9])
def test_top_p_of_a_large_vocabulary_holds_p(p):
    logits = np.random.default_rng(1).normal(0, 0.1, (1, 262_144)).astype(np.float32)
    probabilities = np.sort(softmax(logits[0]))[::-1]
    (found,) = kept(TopP(p), logits)
    assert probabilities[: len(found)].sum() == pytest.approx(p, abs=1e-4)


def test_top_p_of_a_flat_distribution_is_flat():
    """Nothing tells equal tokens apart, so none of them is left out."""
    assert kept(TopP(0.5), np.zeros((1, 1000), np.float32)) == [list(range(1000))]


def chi_square(strategy, probabilities, draws=20_000, seed=0):
    """Pearson's statistic of draws from LOGITS[0]; tokens of probability 0 must not be drawn."""
    keys = jax.random.split(jax.random.key(seed), draws)
    tokens = draw(strategy, jnp.broadcast_to(LOGITS[0], (draws, 5)), keys)
    counts, expected = np.bincount(tokens, minlength=5), draws * np.array(probabilities)
    assert not counts[expected == 0].any()
    return sum((counts - expected)[expected > 0] ** 2 / expected[expected > 0])


@pytest.mark.parametrize(
    "strategy, probabilities",
    [
        (Chain(()), [0.05, 0.4, 0.3, 0.05, 0.2]),
        (Chain((TopK(3),)), [0, 4 / 9, 3 / 9, 0, 2 / 9]),
        (TopP(0.6), [0, 4 / 7, 3 / 7, 0, 0]),
        (Chain((MinP(0.4), Temperature(0.5))), [0, 16 / 29, 9 / 29, 0, 4 / 29]),
        (Greedy(), [0, 1, 0, 0, 0]),
    ],
    ids=str,
)
def test_draws_follow_the_distribution(strategy, probabilities):
    assert chi_square(strategy, probabilities) < 18.5  # at 4 degrees of freedom, 1 in 1,000


def test_the_bound_on_draws_can_be_missed():
    assert chi_square(Temperature(1.1), [0.05, 0.4, 0.3, 0.05, 0.2]) > 18.5


def test_rows_are_drawn_with_their_own_keys():
    keys = jax.random.split(jax.random.key(0), 64)
    logits = jnp.zeros((64, 1000))
    found = draw(Temperature(1.0), logits, keys)
    assert found.dtype == jnp.int32 and len(set(found.tolist())) > 50
    assert draw(Temperature(1.0), logits, keys).tolist() == found.tolist()
    for row in (0, 5, 63):  # whatever stands in the other rows
        alone = draw(Temperature(1.0), logits[row : row + 1], keys[row : row + 1])
        assert alone.tolist() == [found[row]]
    one = jnp.broadcast_to(keys[0], (64,))
    assert len(set(draw(Temperature(1.0), logits, one).tolist())) == 1


def test_greedy_needs_no_luck():
    """The same token whatever the key, the first of equal ones."""
    logits = jnp.asarray([[0.0, 3.0, 3.0, 1.0]] * 8)
    found = draw(Greedy(), logits, jax.random.split(jax.random.key(3), 8))
    assert found.tolist() == [1] * 8


def test_strategies_are_static_arguments():
    apply = jax.jit(lambda logits, sampling: sampling(logits), static_argnames="sampling")
    for strategy in (Greedy(), TopK(2), TopP(0.5), MinP(0.5), Temperature(2.0), Chain((TopK(2),))):
        np.testing.assert_array_equal(apply(LOGITS, sampling=strategy), strategy(LOGITS))
    before = apply._cache_size()
    apply(LOGITS, sampling=Chain((TopK(2),)))
    assert apply._cache_size() == before  # an equal strategy is the same one


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"temperature": 0}, Greedy()),
        ({"temperature": 0, "top_p": 0.5}, Greedy()),
        ({"temperature": 0.0, "top_k": 3, "min_p": 0.1}, Greedy()),
        ({}, Greedy()),
        ({"top_p": 0.9}, Chain((TopP(0.9), Temperature(1.0)))),
        ({"min_p": 0}, Chain((MinP(0), Temperature(1.0)))),
        (
            {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1},
            Chain((TopK(5), TopP(0.9), MinP(0.1), Temperature(0.7))),
        ),
    ],
)
def test_options_make_strategies(options, expected):
    found = make_sampling(**options)
    assert found == expected and hash(found) == hash(expected)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1},
        {"temperature": 1e-40},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": 0},
        {"top_k": -5},
        {"top_p": float("nan")},
        {"min_p": float("nan")},
        {"top_p": 0.0},
        {"top_p": 2.0},
        {"min_p": -0.1},
        {"min_p": 1.5},
        {"temperature": 0, "top_p": 2.0},
    ],
    ids=str,
)
def test_out_of_range_is_refused(options):
    with pytest.raises(UsageError, match="it must be"):
        make_sampling(**options)
