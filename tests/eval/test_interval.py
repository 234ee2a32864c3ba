"""Tests that intervals cover the true mean in 95 of 100 simulated cases."""

import math

import numpy as np
import pytest

from lctrain.eval.interval import EQUAL, bootstrap_interval, share_interval
from tests.numerics import near

CASES = 400
SPREAD = 3 * math.sqrt(0.95 * 0.05 / CASES)  # three standard errors of the coverage


@pytest.mark.parametrize("documents", [10, 40])
def test_95_of_100_bootstrap_intervals_over_documents_cover_the_mean(documents):
    """The mean loss of a document depends on its length, as it does for text."""
    numbers = np.random.default_rng(0)

    def sample(count):
        tokens = numbers.integers(50, 2000, size=count)
        losses = 2.0 + numbers.gamma(4.0, 0.1, size=count) + 50 / tokens
        return losses * tokens, tokens

    sums, tokens = sample(1_000_000)
    truth = sums.sum() / tokens.sum()
    inside = 0
    for case in range(CASES):
        low, high = bootstrap_interval(*sample(documents), seed=case, resamples=400)
        inside += low <= truth <= high
    assert abs(inside / CASES - 0.95) <= SPREAD


@pytest.mark.parametrize("truth", [0.5, 0.9])
def test_95_of_100_intervals_of_a_share_cover_it(truth):
    found = np.random.default_rng(0).binomial(20, truth, size=CASES) / 20
    ends = [share_interval(mean, 20) for mean in found.tolist()]
    inside = sum(low <= truth <= high for low, high in ends)
    assert inside / CASES >= 0.95 - SPREAD


def test_a_share_of_all_or_none_keeps_a_width():
    low, high = share_interval(1.0, 10)
    assert low < 0.8
    assert high == near(1.0)
    assert share_interval(0.0, 10) == near((1 - high, 1 - low))


def test_the_interval_depends_on_the_seed_only():
    sums, counts = np.arange(1.0, 9.0), np.full(8, 3)
    assert bootstrap_interval(sums, counts) == bootstrap_interval(sums, counts)
    assert bootstrap_interval(sums, counts) != bootstrap_interval(sums, counts, seed=1)


def test_too_few_documents_have_no_interval_and_equal_ones_no_width():
    assert all(map(math.isnan, bootstrap_interval(np.array([1.0, 2.0]), np.ones(2))))
    assert not any(map(math.isnan, bootstrap_interval(np.array([1.0, 2.0, 4.0]), np.ones(3))))
    assert all(map(math.isnan, bootstrap_interval(np.ones(EQUAL - 1), np.ones(EQUAL - 1))))
    assert bootstrap_interval(np.ones(EQUAL), np.ones(EQUAL)) == (1.0, 1.0)
