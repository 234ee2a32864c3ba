"""Public norm functions: argument checks, reshaping and the choice of backend."""

from __future__ import annotations

import torch
from torch import Tensor

from lctrain_kernels.checks import require_tensors
from lctrain_kernels.fused_backend import FusedCall, fused_backend
from lctrain_kernels.norm.operators import norm
from lctrain_kernels.norm.residual import NormAndInput


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    weight_offset: float = 0.0,
    float32_product: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Returns `x / sqrt(mean(x^2) + eps) * (weight + weight_offset)` over the last dimension.

    Arithmetic is in float32 (float64 for float64 inputs), also in the backward. Saved for the
    backward are x and one float32 per row.

    Args:
        x: Hidden states [..., H], floating point.
        weight: Weight of the norm, [H], floating point.
        eps: Epsilon that is added to the mean square.
        weight_offset: Number that is added to the weight; 1 for Gemma, whose weights are stored
            as deviations from 1.
        float32_product: Whether to multiply by the weight in float32, as Gemma does. Otherwise the
            normalised values are rounded to x's dtype before the product, as in Llama.
        backend: Implementation: "auto", "triton" or "pytorch".

    Returns:
        The normalised x [..., H], in the dtype of x with `float32_product`, else in the promoted
        dtype of x and weight.

    Raises:
        ValueError: if shapes or dtypes do not fit.
    """
    _check(x, weight, eps)
    options = _options(x, eps, weight_offset, float32_product, backend)
    return norm(x, None, weight, None, *options)[0]


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
    """Returns `rms_norm(x + residual)` and `x + residual`, computed by one kernel.

    Args:
        x: Output of a layer, [..., H], floating point.
        residual: Residual stream, in the shape of x.
        weight: Weight of the norm, [H].
        eps: Epsilon that is added to the mean square.
        weight_offset: Number that is added to the weight; 1 for Gemma.
        float32_product: Whether to multiply by the weight in float32; see rms_norm.
        backend: Implementation: "auto", "triton" or "pytorch".

    Returns:
        The normalised sum [..., H], and the sum x + residual [..., H] in the promoted dtype of x
        and residual. Both results are differentiable.

    Raises:
        ValueError: if shapes or dtypes do not fit.
    """
    require_tensors(residual=residual)
    _check(x, weight, eps)
    if residual.shape != x.shape or not residual.is_floating_point():
        raise ValueError(
            f"residual must be floating point of shape {tuple(x.shape)}, got {residual.dtype} of "
            f"shape {tuple(residual.shape)}. Pass the tensor that x is added to."
        )
    options = _options(x, eps, weight_offset, float32_product, backend)
    return norm(x, residual, weight, None, *options)[:2]


def rms_norm_residual(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    weight_offset: float = 0.0,
    float32_product: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Returns `rms_norm(x)` and x itself; the backward adds both gradients of x in one kernel.

    A pre-norm layer uses the residual stream x twice: as the input of the norm, and in the addition
    after the layer. Use the returned x in the addition: the norm's backward kernel then adds both
    gradients of x, and no kernel of its own has to.

    Args:
        x: Residual stream [..., H], floating point.
        weight: Weight of the norm, [H].
        eps: Epsilon that is added to the mean square.
        weight_offset: Number that is added to the weight; 1 for Gemma.
        float32_product: Whether to multiply by the weight in float32; see rms_norm.
        backend: Implementation: "auto", "triton" or "pytorch".

    Returns:
        The normalised x [..., H] as in rms_norm, and a view of x.

    Raises:
        ValueError: if shapes or dtypes do not fit.
    """
    _check(x, weight, eps)
    options = _options(x, eps, weight_offset, float32_product, backend)
    flat = x.reshape(-1, x.shape[-1])
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        y, passed = norm(flat, None, weight, None, *options)[0], x
    else:
        y, passed = NormAndInput.apply(flat, weight, *options)
    return y.view(x.shape), passed.view(x.shape)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str = "auto",
) -> Tensor:
    """Applies LayerNorm over the last dimension, with float32 arithmetic.

    Args:
        x: Hidden states [..., H], floating point.
        weight: Weight of the norm, [H].
        bias: Bias of the norm, [H] in the dtype of weight, or None.
        eps: Epsilon that is added to the variance.
        backend: Implementation: "auto", "triton" or "pytorch".

    Returns:
        The normalised x [..., H], in the dtype of x.

    Raises:
        ValueError: if shapes or dtypes do not fit.
    """
    _check(x, weight, eps)
    _check_bias(bias, weight)
    options = _options(x, eps, 0.0, False, backend, centered=True)
    return norm(x, None, weight, bias, *options)[0]


def fused_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Returns `layer_norm(x + residual)` and `x + residual`, computed by one kernel.

    Args:
        x: Output of a layer, [..., H], floating point.
        residual: Residual stream, in the shape and dtype of x.
        weight: Weight of the norm, [H].
        bias: Bias of the norm, [H] in the dtype of weight, or None.
        eps: Epsilon that is added to the variance.
        backend: Implementation: "auto", "triton" or "pytorch".

    Returns:
        The normalised sum and the sum, [..., H] in the dtype of x. Both are differentiable.

    Raises:
        ValueError: if shapes or dtypes do not fit.
    """
    require_tensors(residual=residual)
    _check(x, weight, eps)
    _check_bias(bias, weight)
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(
            f"residual must be {x.dtype} of shape {tuple(x.shape)}, got {residual.dtype} of shape "
            f"{tuple(residual.shape)}. Pass the tensor that x is added to."
        )
    options = _options(x, eps, 0.0, False, backend, centered=True)
    return norm(x, residual, weight, bias, *options)[:2]


def _check_bias(bias: Tensor | None, weight: Tensor) -> None:
    if bias is not None and (bias.shape != weight.shape or bias.dtype != weight.dtype):
        raise ValueError(
            f"bias must have the shape and dtype of weight, {tuple(weight.shape)} and "
            f"{weight.dtype}, got {tuple(bias.shape)} and {bias.dtype}. Convert one of them."
        )


def _options(
    x: Tensor,
    eps: float,
    weight_offset: float,
    float32_product: bool,
    backend: str,
    centered: bool = False,
) -> tuple[float, float, bool, bool, str]:
    """Returns the fields of NormOptions and the backend, in the operator's order of arguments."""
    chosen = fused_backend("norm", FusedCall(x.device, x.dtype, x.shape[-1]), backend)
    return float(eps), float(weight_offset), bool(float32_product), centered, chosen


def _check(x: Tensor, weight: Tensor, eps: float) -> None:
    require_tensors(x=x, weight=weight)
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
