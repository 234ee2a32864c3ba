import math

import numpy as np

from lctrain.eval import token_mean
from tests.numerics import near


def test_single_token_documents_give_the_usual_standard_error() -> None:
    values = np.random.default_rng(0).normal(size=30)
    mean, error = token_mean(values, np.ones(30))
    assert mean == near(values.mean())
    assert error == near(values.std(ddof=1) / math.sqrt(30))


def test_mean_is_weighted_by_tokens_and_not_by_documents() -> None:
    mean, _ = token_mean(np.array([10.0, 90.0]), np.array([10, 30]))
    assert mean == near(100 / 40)


def test_splitting_a_document_changes_its_weight_in_the_error_only() -> None:
    whole = token_mean(np.array([10.0, 90.0]), np.array([10, 30]))
    halves = token_mean(np.array([10.0, 45.0, 45.0]), np.array([10, 15, 15]))
    assert halves[0] == whole[0]
    assert halves[1] < whole[1]


def test_one_document_has_no_standard_error() -> None:
    mean, error = token_mean(np.array([6.0]), np.array([3]))
    assert mean == 2.0
    assert math.isnan(error)


def test_documents_that_agree_have_standard_error_zero() -> None:
    assert token_mean(np.array([4.0, 10.0]), np.array([2, 5])) == (2.0, 0.0)


def test_standard_error_is_the_spread_of_the_mean_over_samples_of_documents() -> None:
    """Documents differ in length and mean loss, so the naive s / sqrt(tokens) is far too small."""
    generator = np.random.default_rng(0)

    def sample() -> tuple[float, float, float]:
        counts = generator.integers(1, 200, size=50)
        levels = generator.normal(3.0, 0.5, size=50)
        sums = levels * counts + generator.normal(size=50) * np.sqrt(counts)
        naive = math.sqrt((1 + 0.5**2) / counts.sum())
        return *token_mean(sums, counts), naive

    means, errors, naive = np.array([sample() for _ in range(2000)]).T
    # three standard errors of a standard deviation over 2000 samples
    assert abs(errors.mean() / means.std() - 1) < 3 / math.sqrt(2 * 2000)
    assert naive.mean() < means.std() / 3
