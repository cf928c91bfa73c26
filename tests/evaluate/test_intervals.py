"""Intervals against published values, and against what clusters must mean."""

import itertools
import math

import numpy as np
import pytest

from gemma_jax.evaluate.statistics import (
    LEAST_CORRELATION,
    correlation,
    effective_size,
    estimate,
    wilson,
)


@pytest.mark.parametrize(
    "hits, trials, low, high",
    [  # Newcombe 1998, Statistics in Medicine 17, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_published_intervals(hits, trials, low, high):
    assert wilson(hits / trials, trials) == pytest.approx((low, high), abs=5e-5)


def test_wilson_is_symmetric_and_holds_the_share():
    for hits, trials in [(0, 1), (1, 1), (3, 7), (20, 20)]:
        low, high = wilson(hits / trials, trials)
        other_low, other_high = wilson(1 - hits / trials, trials)
        assert (low, high) == pytest.approx((1 - other_high, 1 - other_low))
        assert 0 <= low <= hits / trials <= high <= 1


def test_independent_haystacks_count_in_full():
    found = estimate([(i, float(i % 4 > 0)) for i in range(20)])
    assert (found.trials, found.haystacks, found.effective) == (20, 20, 20)
    assert (found.low, found.high) == pytest.approx(wilson(0.75, 20))


def test_haystacks_that_agree_within_themselves_count_once_each():
    """All answers of a haystack equal: ten questions of it say what one says."""
    scores = [(h, float(h % 2)) for h in range(8) for _ in range(10)]
    found = estimate(scores)
    assert found.effective == pytest.approx(8)
    assert (found.low, found.high) == pytest.approx(wilson(0.5, 8))


def test_one_haystack_is_never_taken_for_independent_questions():
    found = estimate([("only", 1.0)] * 100)
    assert found.effective == pytest.approx(100 / (1 + 99 * LEAST_CORRELATION))
    assert found.low < wilson(1.0, 100)[0]


def test_correlation_is_recovered_from_simulated_haystacks():
    """Scores whose haystack sets their mean, with a correlation of 0.25 by construction."""
    rng = np.random.default_rng(0)
    means = np.where(rng.random(4000) < 0.5, 0.25, 0.75)  # variance 1/16 of 1/4
    groups = [(rng.random(6) < mean).astype(float).tolist() for mean in means]
    assert correlation(groups) == pytest.approx(0.25, abs=0.02)
    independent = [(rng.random(6) < 0.5).astype(float).tolist() for _ in means]
    assert correlation(independent) == pytest.approx(0.0, abs=0.02)


def test_correlation_is_not_made_up():
    assert correlation([[1.0, 0.0, 1.0]]) is None  # one haystack
    assert correlation([[1.0], [0.0]]) is None  # one question each
    assert correlation([[1.0, 1.0], [1.0, 1.0]]) is None  # nothing varies
    assert correlation([[1.0, 0.0], [1.0, 0.0]]) == 0.0


def test_effective_size_lies_between_haystacks_and_trials():
    for sizes, rho in itertools.product([[5, 5, 5], [1, 9], [20]], [0.0, 0.1, 0.5, 1.0]):
        size = effective_size(sizes, rho)
        assert size <= sum(sizes) + 1e-9
        assert size >= (sum(sizes) ** 2 / sum(m * m for m in sizes)) - 1e-9
    assert effective_size([4, 4], 1.0) == pytest.approx(2)
    assert math.isclose(effective_size([4, 4], 0.0), 8)


def test_intervals_of_clustered_answers_hold_the_truth():
    """Of 400 made-up grids of 8 haystacks with correlated answers, nearly 95 % hold the true value;
    taking the questions for independent, far fewer would."""
    rng = np.random.default_rng(1)
    held = naive = 0
    for _ in range(400):
        means = rng.beta(2, 2, 8)
        scores = [
            (h, float(rng.random() < mean)) for h, mean in enumerate(means) for _ in range(20)
        ]
        found = estimate(scores)
        held += found.low <= 0.5 <= found.high
        low, high = wilson(found.accuracy, found.trials)
        naive += low <= 0.5 <= high
    assert held / 400 > 0.88 and naive / 400 < 0.7


def test_no_trials_have_no_accuracy():
    assert estimate([]) is None
