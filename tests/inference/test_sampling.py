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
    np.testing.assert_allclose(Temperature(0.5)(jnp.asarray(LOGITS)), LOGITS / 0.5)


def test_what_is_out_stays_out():
    logits = np.where(np.arange(5) == 1, -np.inf, LOGITS).astype(np.float32)
    for strategy in (TopK(2), TopP(0.9), MinP(0.1), Temperature(2.0)):
        assert 1 not in kept(strategy, logits)[0]


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 0.999])
def test_top_p_is_the_smallest_set_that_holds_p(p):
    logits = np.random.default_rng(0).normal(0, 2, (20, 50)).astype(np.float32)
    for row, found in zip(logits, kept(TopP(p), logits), strict=True):
        probabilities = np.exp(row.astype(np.float64)) / np.exp(row.astype(np.float64)).sum()
        order = np.argsort(-probabilities)
        size = int(np.searchsorted(np.cumsum(probabilities[order]), p)) + 1
        assert sorted(order[:size].tolist()) == found


def test_draws_follow_the_distribution():
    keys = jax.random.split(jax.random.key(0), 20_000)
    logits = jnp.broadcast_to(LOGITS[0], (20_000, 5))
    counts = np.bincount(np.asarray(draw(Chain((TopK(3),)), logits, keys)), minlength=5)
    np.testing.assert_allclose(counts / 20_000, [0, 4 / 9, 3 / 9, 0, 2 / 9], atol=0.015)


def test_rows_are_drawn_with_their_own_keys():
    keys = jax.random.split(jax.random.key(0), 64)
    logits = jnp.zeros((64, 1000))
    found = draw(Temperature(1.0), logits, keys)
    assert len(set(found.tolist())) > 50
    assert draw(Temperature(1.0), logits[5:6], keys[5:6]).tolist() == [found[5]]


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"temperature": 0}, Greedy()),
        ({"temperature": 0, "top_p": 0.5}, Greedy()),
        ({}, Chain((Temperature(1.0),))),
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
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": 0},
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
