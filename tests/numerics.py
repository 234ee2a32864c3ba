"""Compares numbers with float64 and with plain PyTorch's error.

from tests.numerics import assert_error_at_most_twice
"""

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
        actual: what is tested, any shape and floating dtype.
        same_precision_reference: plain PyTorch's result from the same inputs.
        float64_reference: the result from float64 inputs that hold the same values.
        name: what to call it in the failure.

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
