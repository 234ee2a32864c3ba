"""RMSNorm and LayerNorm in plain PyTorch: the oracle, and the path without a GPU.

All statistics and gradients are in float32 (float64 for float64 inputs).
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
    """Normalises rows.

    Args:
        x: [T, H].
        weight: [H].
        bias: [H] or None.
        eps: See NormOptions, as for the following.
        weight_offset: Added to the weight.
        float32_product: Multiply by the weight before rounding.
        centered: Subtract the mean.

    Returns:
        y [T, H], mean [T] (no elements unless centered) and rstd [T].
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
    """Gradients of norm_fwd.

    Args:
        dy: [T, H], gradient of y.
        dsum: [T, H], a gradient to add to that of x, or None.
        x: [T, H].
        weight: [H].
        mean: [T] or no elements.
        rstd: [T].
        weight_offset: Added to the weight.
        centered: Whether the mean was subtracted.
        needs_weight: Whether the gradient of the weight is wanted.
        needs_bias: Whether the gradient of the bias is needed.

    Returns:
        Gradients of x [T, H], weight [H] and bias [H] (no elements where not wanted), in the dtypes
        of x and weight.
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
