"""The rule for numerical error: at most twice that of plain PyTorch at the same precision.

Both errors are measured against a float64 reference. The tests assert the rule
(`tests/numerics.py`). `lctrain-bench --check` gives no figures for a kernel that breaks it.
"""

from dataclasses import dataclass

import torch

MAX_RATIO = 2.0


@dataclass(frozen=True)
class ErrorRatio:
    """Error of a tensor against float64, relative to the error of plain PyTorch.

    Both ratios must be at most 2.

    Attributes:
        actual_norm: Relative error of the tensor, ||actual - reference|| / ||reference||.
        plain_norm: Relative error of plain PyTorch, ||plain - reference|| / ||reference||.
        norm: actual_norm / plain_norm, where plain_norm counts as at least one float32 rounding.
        maximum: Largest absolute error of the tensor over that of plain PyTorch.
    """

    actual_norm: float
    plain_norm: float
    norm: float
    maximum: float

    @property
    def passes(self) -> bool:
        """Returns whether both ratios are at most 2; a NaN does not pass."""
        return self.norm <= MAX_RATIO and self.maximum <= MAX_RATIO


def error_ratio(actual: torch.Tensor, plain: torch.Tensor, reference: torch.Tensor) -> ErrorRatio:
    """Compares the error of `actual` with that of plain PyTorch.

    Plain PyTorch may be exact by chance, as in a softmax over one key. So its norm error counts as
    at least one float32 rounding, because the kernels keep their state in float32. Its largest
    error counts as at least half a unit in the last place of its dtype.

    Args:
        actual: Tensor to judge, any shape and floating dtype.
        plain: The same tensor, computed by plain PyTorch at the same precision.
        reference: The same tensor, computed in float64.

    Returns:
        Both errors and their ratios, over the entries where the reference is finite. If infinities
        are not at the same places with the same signs, the ratios are infinite.

    Raises:
        ValueError: if shapes differ, if the reference is not float64, or if plain PyTorch is not
            finite where the reference is; any result would then pass.
    """
    if not actual.shape == plain.shape == reference.shape:
        raise ValueError(
            f"actual, plain and reference must have one shape, got {tuple(actual.shape)}, "
            f"{tuple(plain.shape)} and {tuple(reference.shape)}. Compare like with like."
        )
    if reference.dtype != torch.float64:
        raise ValueError(
            f"reference must be float64, got {reference.dtype}. Compute it from float64 inputs."
        )
    reference = reference.detach()
    actual64, plain64 = (t.detach().to(reference.device, torch.float64) for t in (actual, plain))
    finite = reference.isfinite()
    if not torch.equal(actual64[~finite], reference[~finite]):
        return ErrorRatio(float("inf"), 0.0, float("inf"), float("inf"))
    reference, actual64, plain64 = reference[finite], actual64[finite], plain64[finite]
    if not plain64.isfinite().all():
        raise ValueError(
            "plain must be finite wherever reference is, got an infinity or NaN. "
            "Scale the inputs so that plain PyTorch does not overflow."
        )
    if reference.numel() == 0:
        return ErrorRatio(0.0, 0.0, 0.0, 0.0)

    actual_error, plain_error = (actual64 - reference).abs(), (plain64 - reference).abs()
    scale = reference.norm().item()
    eps = torch.finfo(actual.dtype).eps
    state_eps = min(eps, torch.finfo(torch.float32).eps)
    norm_floor = state_eps * scale
    maximum_floor = max(eps / 2, state_eps) * reference.abs().max().item()
    return ErrorRatio(
        actual_norm=_divide(actual_error.norm().item(), scale),
        plain_norm=_divide(plain_error.norm().item(), scale),
        norm=_divide(actual_error.norm().item(), max(plain_error.norm().item(), norm_floor)),
        maximum=_divide(actual_error.max().item(), max(plain_error.max().item(), maximum_floor)),
    )


def _divide(numerator: float, denominator: float) -> float:
    """Returns numerator / denominator, and 0 for 0 / 0."""
    if denominator == 0.0:
        return 0.0 if numerator == 0.0 else float("inf")
    return numerator / denominator
