"""rms_norm, fused_add_rms_norm and layer_norm: checks, shapes and the choice of backend."""

from __future__ import annotations

from torch import Tensor

from lctrain_kernels.fused_backend import fused_backend
from lctrain_kernels.norm.operators import norm

MAX_COLUMNS = 32768  # of the Triton kernels


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    weight_offset: float = 0.0,
    float32_product: bool = False,
    backend: str = "auto",
) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * (weight + weight_offset)` over the last dimension.

    Statistics, gradients and the sum over rows in the weight's gradient are float32 (float64 for
    float64 inputs). Saved for the backward: x, and one float32 per row.

    Args:
        x: [..., H], floating point.
        weight: [H], floating point.
        eps: Added to the mean square.
        weight_offset: 1 for Gemma, whose weights are deviations from 1.
        float32_product: Whether to multiply by the weight in float32, as Gemma does. Otherwise the
            normalised values are rounded to x's dtype before the product, as in Llama.
        backend: Implementation: "auto", "triton" or "pytorch".

    Returns:
        [..., H]; in the dtype of x with `float32_product`, else in the promoted one of x and
        weight.

    Raises:
        ValueError: if shapes or dtypes do not fit.
    """
    _check(x, weight, eps)
    flat = x.reshape(-1, x.shape[-1])
    y, _, _, _ = norm(
        flat, None, weight, None, *_options(x, eps, weight_offset, float32_product, backend)
    )
    return y.view(x.shape)


def fused_add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    weight_offset: float = 0.0,
    float32_product: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`rms_norm(x + residual)` and `x + residual`, in one pass.

    Args:
        x: [..., H], floating point.
        residual: The same shape.
        weight: [H].
        eps: See rms_norm.
        weight_offset: See rms_norm.
        float32_product: See rms_norm.
        backend: See rms_norm.

    Returns:
        The normalised sum and the sum, both [..., H]. The sum has the promoted dtype of x and
        residual; its gradient is added to that of x and residual.

    Raises:
        ValueError: if shapes or dtypes do not fit.
    """
    _check(x, weight, eps)
    if residual.shape != x.shape or not residual.is_floating_point():
        raise ValueError(
            f"residual must be floating point of shape {tuple(x.shape)}, got {residual.dtype} of "
            f"shape {tuple(residual.shape)}. Pass the tensor that x is added to."
        )
    columns = x.shape[-1]
    y, total, _, _ = norm(
        x.reshape(-1, columns),
        residual.reshape(-1, columns),
        weight,
        None,
        *_options(x, eps, weight_offset, float32_product, backend),
    )
    return y.view(x.shape), total.view(x.shape)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str = "auto",
) -> Tensor:
    """LayerNorm over the last dimension, in float32 inside.

    Args:
        x: [..., H], floating point.
        weight: [H].
        bias: [H] in the dtype of weight, or None.
        eps: Added to the variance.
        backend: See rms_norm.

    Returns:
        [..., H] in the dtype of x.

    Raises:
        ValueError: if shapes or dtypes do not fit.
    """
    _check(x, weight, eps)
    if bias is not None and (bias.shape != weight.shape or bias.dtype != weight.dtype):
        raise ValueError(
            f"bias must have the shape and dtype of weight, {tuple(weight.shape)} and "
            f"{weight.dtype}, got {tuple(bias.shape)} and {bias.dtype}. Convert one of them."
        )
    flat = x.reshape(-1, x.shape[-1])
    rest = _options(x, eps, 0.0, False, backend)
    y, _, _, _ = norm(flat, None, weight, bias, *rest[:3], True, rest[-1])
    return y.view(x.shape)


def _options(
    x: Tensor, eps: float, weight_offset: float, float32_product: bool, backend: str
) -> tuple[float, float, bool, bool, str]:
    """Returns the fields of NormOptions and the backend, as the operator takes them."""
    chosen = fused_backend(x.device, x.dtype, backend)
    if chosen == "triton" and x.shape[-1] > MAX_COLUMNS:
        if backend == "triton":
            raise ValueError(
                f"x must have at most {MAX_COLUMNS} columns for backend='triton', got "
                f"{x.shape[-1]}. Pass backend='auto'."
            )
        chosen = "pytorch"
    return float(eps), float(weight_offset), bool(float32_product), False, chosen


def _check(x: Tensor, weight: Tensor, eps: float) -> None:
    if x.dim() < 1 or not x.is_floating_point() or not weight.is_floating_point():
        raise ValueError(
            f"x and weight must be floating point with at least one dimension, got {x.dtype} of "
            f"shape {tuple(x.shape)} and {weight.dtype}. Convert them."
        )
    if weight.shape != x.shape[-1:]:
        raise ValueError(
            f"weight must have shape ({x.shape[-1]},), got {tuple(weight.shape)}. "
            "Pass one value per column of x."
        )
    if x.device != weight.device:
        raise ValueError(
            f"x and weight must be on one device, got {x.device} and {weight.device}. Move one."
        )
    if eps < 0.0:
        raise ValueError(f"eps must be at least 0, got {eps}. Common values are 1e-6 and 1e-5.")
