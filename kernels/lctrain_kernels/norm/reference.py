"""RMSNorm and LayerNorm in plain PyTorch: the reference of the tests, and the CPU path.

Arithmetic is in float32 (float64 for float64 inputs).
"""

from __future__ import annotations

import torch
from torch import Tensor


def norm_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float,
    weight_offset: float,
    float32_product: bool,
    centered: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalises the rows of x.

    Args:
        x: Hidden states [T, H].
        weight: Weight of the norm, [H].
        bias: Bias of the norm, [H], or None.
        eps: Epsilon that is added to the mean square or to the variance.
        weight_offset: Number that is added to the weight.
        float32_product: Whether to multiply by the weight before rounding.
        centered: Whether to subtract the mean.

    Returns:
        The normalised rows [T, H], the mean [T] (an empty tensor unless centered) and
        1 / standard deviation [T].
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    out_dtype = torch.promote_types(x.dtype, weight.dtype)
    mean = wide.new_empty(0)
    if centered:
        mean = wide.mean(-1)
        wide = wide - mean[:, None]
    rstd = torch.rsqrt(wide.square().mean(-1) + eps)
    normalised = wide * rstd[:, None]
    if float32_product or centered:
        y = (weight.to(normalised.dtype) + weight_offset) * normalised
        if bias is not None:
            y = y + bias.to(y.dtype)
        return y.to(x.dtype), mean, rstd
    if weight_offset != 0.0:
        weight = weight.to(wide.dtype) + weight_offset
    y = weight * normalised.to(x.dtype)
    return y.to(out_dtype), mean, rstd


def norm_bwd(
    dy: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    *,
    weight_offset: float,
    centered: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of norm_fwd's x, weight and bias.

    Args:
        dy: Gradient of the normalised rows, [T, H].
        dsum: Gradient of the sum x + residual, [T, H], which is added to that of x; or None.
        x: Input of the norm, [T, H].
        weight: Weight of the norm, [H].
        mean: Mean of each row, [T]; empty for RMSNorm.
        rstd: 1 / standard deviation of each row, [T].
        weight_offset: Number that is added to the weight.
        centered: Whether the mean was subtracted.
        needs_weight: Whether to compute the gradient of the weight.
        needs_bias: Whether to compute the gradient of the bias.

    Returns:
        Gradients of x [T, H] in x's dtype, and of weight [H] and bias [H] in weight's dtype.
        Gradients not needed are empty tensors.
    """
    wide_dtype = rstd.dtype
    wide, wide_dy = x.to(wide_dtype), dy.to(wide_dtype)
    if centered:
        wide = wide - mean[:, None]
    normalised = wide * rstd[:, None]
    weighted = wide_dy * (weight.to(wide_dtype) + weight_offset)
    correction = normalised * (weighted * normalised).mean(-1, keepdim=True)
    if centered:
        correction = correction + weighted.mean(-1, keepdim=True)
    dx = (weighted - correction) * rstd[:, None]
    if dsum is not None:
        dx = dx + dsum
    dweight = dbias = weight.new_empty(0)
    if needs_weight:
        dweight = (wide_dy * normalised).sum(0).to(weight.dtype)
    if needs_bias:
        dbias = wide_dy.sum(0).to(weight.dtype)
    return dx.to(x.dtype), dweight, dbias
