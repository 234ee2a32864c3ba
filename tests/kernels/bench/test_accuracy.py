"""Tests the rule for numerical error: kernels that pass or fail, and refused inputs."""

import math

import pytest
import torch

from lctrain_kernels.bench.accuracy import error_ratio
from tests.numerics import assert_error_at_most_twice


def reference_and_rounded():
    reference = torch.randn(64, 32, dtype=torch.float64)
    return reference, reference.to(torch.bfloat16)


def test_the_same_rounding_has_ratio_one():
    reference, plain = reference_and_rounded()
    ratio = assert_error_at_most_twice(plain.clone(), plain, reference)
    assert ratio.norm == 1.0
    assert ratio.maximum <= 1.0


def test_three_times_the_error_fails():
    reference, plain = reference_and_rounded()
    actual = reference + 3 * (plain.double() - reference)
    with pytest.raises(AssertionError, match=r"ratio 3\.00 in norm"):
        assert_error_at_most_twice(actual, plain, reference)


def test_one_wrong_entry_that_the_norm_hides_fails():
    reference = torch.randn(1000, 1000, dtype=torch.float64)
    plain = reference.to(torch.bfloat16)
    actual = plain.clone()
    actual[17, 5] += 0.5
    ratio = error_ratio(actual, plain, reference)
    assert ratio.norm <= 2.0
    assert not ratio.passes


def test_an_exact_plain_result_leaves_one_float32_rounding():
    reference = torch.randn(100, dtype=torch.float32).double()
    plain = reference.float()
    eps = torch.finfo(torch.float32).eps
    assert error_ratio(plain * (1 + eps), plain, reference).passes
    assert not error_ratio(plain * (1 + 8 * eps), plain, reference).passes


def test_nan_fails():
    reference, plain = reference_and_rounded()
    actual = plain.clone()
    actual[0, 0] = math.nan
    assert not error_ratio(actual, plain, reference).passes


@pytest.mark.parametrize("value", [math.inf, 0.0], ids=["wrong sign", "finite"])
def test_infinities_must_agree(value):
    reference, plain = reference_and_rounded()
    reference[0, 0] = -math.inf
    plain[0, 0] = -math.inf
    actual = plain.clone()
    assert error_ratio(actual, plain, reference).passes
    actual[0, 0] = value
    assert not error_ratio(actual, plain, reference).passes


def test_nothing_to_compare_passes():
    empty = torch.empty(0, 4, dtype=torch.float64)
    assert error_ratio(empty.half(), empty.half(), empty).passes


def test_different_shapes_are_refused():
    reference, plain = reference_and_rounded()
    with pytest.raises(ValueError, match="must have one shape"):
        error_ratio(plain[:1], plain, reference)


def test_a_reference_that_is_not_float64_is_refused():
    _, plain = reference_and_rounded()
    with pytest.raises(ValueError, match="must be float64"):
        error_ratio(plain, plain, plain.float())


def test_an_overflowed_plain_result_is_refused():
    reference, plain = reference_and_rounded()
    plain[0, 0] = math.inf
    with pytest.raises(ValueError, match="plain must be finite"):
        error_ratio(plain.clone(), plain, reference)
