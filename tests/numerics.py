"""Compares numbers. Every tolerance of the tests is defined in this module.

| What is compared | By |
|---|---|
| the same operations in the same order, on the same shapes | `torch.equal`, `==` |
| results in float32 or less with plain PyTorch's | `assert_error_at_most_twice` |
| many tensors, such as gradients | `assert_errors_at_most_twice` |
| a sum, such as a loss | `assert_sum_error_at_most_twice` |
| float32 sums of the same terms in another order | `assert_equal_sums` |
| float64 attention of several ranks with that of one | `assert_equals_one_rank` |
| two float64 computations of one quantity | `assert_equal_in_float64`, `near` |
| a few counted float32 operations | `near_roundings`, `as_float32` |
| numbers that must not be equal | `assert_far_apart` |
"""

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from lctrain_kernels.bench.accuracy import MAX_RATIO, ErrorRatio, error_ratio


def assert_error_at_most_twice(
    actual: torch.Tensor,
    same_precision_reference: torch.Tensor,
    float64_reference: torch.Tensor,
    name: str = "result",
) -> ErrorRatio:
    """Fails if `actual` is more than twice as far from float64 as plain PyTorch is.

    Args:
        actual: The tested result, any shape and floating dtype.
        same_precision_reference: Plain PyTorch's result from the same inputs.
        float64_reference: The result from float64 inputs that hold the same values.
        name: Name of the result in the error message.

    Returns:
        The errors and their ratios (see `lctrain_kernels.bench.accuracy.error_ratio`).
    """
    ratio = error_ratio(actual, same_precision_reference, float64_reference)
    assert ratio.passes, (
        f"{name}: error {ratio.actual_norm:.3e} against float64 (plain PyTorch: "
        f"{ratio.plain_norm:.3e}), ratio {ratio.norm:.2f} in norm and {ratio.maximum:.2f} in the "
        f"largest entry; at most {MAX_RATIO} each"
    )
    return ratio


def assert_errors_at_most_twice(
    actual: Mapping[str, torch.Tensor],
    same_precision_reference: Mapping[str, torch.Tensor],
    float64_reference: Mapping[str, torch.Tensor],
) -> ErrorRatio:
    """Applies `assert_error_at_most_twice` to many tensors together, such as all gradients.

    Each tensor is divided by the norm of its float64 reference, so all have equal weight. Tensors
    are not judged singly, because the error of one small tensor is partly luck.

    Args:
        actual: Tested tensors by name; names that `float64_reference` lacks are ignored.
        same_precision_reference: Plain PyTorch's results by name.
        float64_reference: Results from float64 inputs by name.
    """
    names = sorted(float64_reference)
    finite = {name: float64_reference[name].isfinite() for name in names}
    norms = {n: float64_reference[n][finite[n]].norm().clamp(min=1e-300) for n in names}

    def joined(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([(tensors[name].double() / norms[name]).flatten() for name in names])

    dtypes = {actual[name].dtype for name in names}
    assert len(dtypes) == 1, dtypes
    return assert_error_at_most_twice(
        joined(actual).to(dtypes.pop()),
        joined(same_precision_reference),
        joined(float64_reference),
        f"{len(names)} tensors",
    )


def assert_sum_error_at_most_twice(
    actual: torch.Tensor | float,
    same_precision_terms: torch.Tensor,
    float64_terms: torch.Tensor,
    name: str = "sum",
) -> None:
    """Fails if a sum's error exceeds twice the summed absolute errors of plain PyTorch's terms.

    Absolute values are summed, because errors of terms cancel only by luck. The bound also allows
    one rounding per term for the additions.

    Args:
        actual: The sum of the terms, such as a loss.
        same_precision_terms: Plain PyTorch's terms, such as the losses of all tokens.
        float64_terms: The same terms in float64.
        name: Name of the sum in the error message.
    """
    exact = float64_terms.detach().double()
    terms = (same_precision_terms.detach().double() - exact).abs().sum().item()
    rounding = torch.finfo(torch.float32).eps / 2 * len(exact.flatten()) * exact.abs().sum().item()
    error = abs(float(torch.as_tensor(actual).detach()) - exact.sum().item())
    assert error <= MAX_RATIO * (terms + rounding), (
        f"{name}: error {error:.1e} against float64, plain PyTorch: up to {terms + rounding:.1e}"
    )


FLOAT64_BOUND = 1e-10
"""What float64 computations of one quantity may differ by, over the larger of 1 and its entries.

One rounding is 1.1e-16. The tests' models and losses add fewer than 1e4 numbers in a row, and their
derivatives amplify an error by less than 1e2: 1e-10 on the worst case. Measured differences are
below 1e-13. One step in float32 (6e-8) on the way breaks the bound.
"""
FAR = 1e-3
"""Least difference over the largest entry that no rounding of float32 explains (6e-8 each)."""


def assert_equal_in_float64(
    actual: Any, expected: Any, name: str = "result", dtype: torch.dtype = torch.float64
) -> None:
    """Fails if two results of float64 computations differ by more than rounding explains.

    Args:
        actual: A tensor, or a mapping or sequence of tensors.
        expected: The same quantity, computed in another way.
        name: Name of the result in the error message.
        dtype: Dtype of both results, to which the float64 values were rounded at the end.
    """
    if isinstance(expected, Mapping):
        assert actual.keys() == expected.keys(), name
        for key in expected:
            assert_equal_in_float64(actual[key], expected[key], f"{name} {key}", dtype)
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected), name
        for i, (one, other) in enumerate(zip(actual, expected, strict=True)):
            assert_equal_in_float64(one, other, f"{name} {i}", dtype)
    else:
        assert actual.dtype == expected.dtype == dtype, f"{name}: {actual.dtype}"
        assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)}"
        actual, expected = actual.detach().double(), expected.detach().double()
        finite = expected.isfinite()
        assert torch.equal(actual[~finite], expected[~finite]), f"{name}: other infinities"
        actual, expected = actual[finite], expected[finite]
        if actual.numel():
            bound = FLOAT64_BOUND * max(1.0, expected.abs().max().item())
            rounded = torch.finfo(dtype).eps * expected.abs()  # half of it in each of the two
            error = ((actual - expected).abs() - rounded).max().item()
            assert error <= bound, f"{name}: differs by {error:.1e}, at most {bound:.1e}"


def assert_equal_sums(actual: torch.Tensor, expected: torch.Tensor, terms: int = 1024) -> None:
    """Fails if two float32 sums of the same terms differ by more than the order of additions.

    Args:
        actual: Sums, rounded to the dtype of the tensor.
        expected: The same sums in another order, in the same dtype.
        terms: Number of terms. No partial sum is larger than the largest entry, or nearly so.
    """
    actual, scale = actual.detach().double(), expected.detach().abs().max().item()
    rounded = torch.finfo(expected.dtype).eps * expected.detach().double().abs()
    bound = rounded + terms * torch.finfo(torch.float32).eps / 2 * scale
    error = ((actual - expected.double()).abs() - bound).max().item()
    assert error <= 0, f"differs by {error:.1e} more than the order of additions explains"


SHARED_BOUND = 1e-12
"""What attention in float64 may differ by between one rank and several, over the largest entry.

The ranks compute the same terms. Only sums of at most 1e3 gradients, each rounded by 1.1e-16, run
in another order.
"""


def assert_equals_one_rank(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """Fails if results of several ranks in float64 differ from those of one rank.

    Args:
        actual: Results that were put together from several ranks.
        expected: The same results of one rank.
    """
    for index, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert one.dtype == other.dtype == torch.float64
        assert one.shape == other.shape
        assert one.isfinite().all()
        if other.numel():
            error = ((one - other).abs().max() / other.abs().max()).item()
            assert error <= SHARED_BOUND, f"result {index} differs by {error:.1e} of its largest"


def near(expected: Any) -> Any:
    """Returns an object that equals a float64 result up to its rounding (`pytest.approx`).

    Args:
        expected: A number, or a sequence, mapping or array of numbers.
    """
    return pytest.approx(expected, rel=FLOAT64_BOUND, abs=FLOAT64_BOUND)


def as_float32(expected: float) -> float:
    """Rounds a Python float to float32."""
    return torch.tensor(expected, dtype=torch.float32).item()


def near_roundings(expected: Any, roundings: float, dtype: torch.dtype = torch.float32) -> Any:
    """Returns an object that equals a result up to a counted number of roundings.

    Args:
        expected: A number, or a sequence, mapping or array of numbers.
        roundings: Number of roundings allowed between two results, each half of the dtype's eps.
            Results below the smallest normal number may be flushed to zero.
        dtype: The lowest precision in the computation.
    """
    format, single = torch.finfo(dtype), torch.finfo(torch.float32)
    smallest = max(single.tiny, format.tiny * format.eps)
    return pytest.approx(expected, rel=roundings * format.eps / 2, abs=smallest)


def assert_far_apart(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Fails unless two results differ by far more than rounding explains."""
    difference = (actual.detach() - expected.detach()).abs().max().item()
    scale = expected.detach().abs().max().item()
    assert difference > FAR * scale, f"differs by {difference:.1e} of {scale:.1e} only"
