"""Rotary embeddings in plain PyTorch: the reference of the tests, and the CPU path.

Arithmetic is in float32 (float64 for float64 inputs).
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    weight: Tensor | None,
    *,
    interleaved: bool,
    full_table: bool,
    eps: float,
    weight_offset: float,
    inverse: bool = False,
) -> Tensor:
    """Rotates x [T, H, D] by RoPE, after RMSNorm if a weight is given, and rounds the result once.

    Args:
        x: Queries or keys, [T, H, D].
        cos: Cosines [rows, R or R / 2].
        sin: Sines, in the shape of cos.
        positions: Row of cos and sin for each token, [T], integers; or None, see launch.rotate.
        weight: Weight of the norm, [D], or None for no norm.
        interleaved: Whether columns 2 i and 2 i + 1 are a pair, instead of i and i + R / 2.
        full_table: Whether cos and sin have R columns instead of R / 2.
        eps: Epsilon of the norm.
        weight_offset: Number that is added to the weight.
        inverse: Whether to rotate by the negative angle.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if weight is not None:
        rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        wide = wide * rstd * (weight.to(wide.dtype) + weight_offset)
    return _turn(wide, cos, sin, positions, interleaved, full_table, inverse).to(x.dtype)


def norm_rotary_bwd(
    dout: Tensor,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    weight: Tensor,
    *,
    interleaved: bool,
    full_table: bool,
    eps: float,
    weight_offset: float,
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of x [T, H, D] and weight [D], for RMSNorm followed by the rotation.

    dout [T, H, D] is the gradient of the result. The other arguments are those of `rotate`.
    """
    wide_dtype = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(wide_dtype)
    dy = _turn(dout.to(wide_dtype), cos, sin, positions, interleaved, full_table, True)
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normalised = wide * rstd
    dweight = (dy * normalised).sum((0, 1))
    dy = dy * (weight.to(wide_dtype) + weight_offset)
    dx = (dy - normalised * (dy * normalised).mean(-1, keepdim=True)) * rstd
    return dx.to(x.dtype), dweight.to(weight.dtype)


def _turn(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
    full_table: bool,
    inverse: bool,
) -> Tensor:
    rotary = cos.shape[1] if full_table else 2 * cos.shape[1]
    if positions is None:
        positions = torch.arange(x.shape[0], device=cos.device) % cos.shape[0]
    half = rotary // 2
    cos, sin = cos[positions].to(x.dtype)[:, None], sin[positions].to(x.dtype)[:, None]
    cos2, sin2 = (cos[..., half:], sin[..., half:]) if full_table else (cos, sin)
    cos, sin = cos[..., :half], sin[..., :half]
    if interleaved:
        a, b = x[..., 0:rotary:2], x[..., 1:rotary:2]
    else:
        a, b = x[..., :half], x[..., half:rotary]
    if inverse:
        a, b = a * cos + b * sin2, b * cos2 - a * sin
    else:
        a, b = a * cos - b * sin, b * cos2 + a * sin2
    turned = torch.stack((a, b), dim=-1).flatten(-2) if interleaved else torch.cat((a, b), -1)
    return torch.cat((turned, x[..., rotary:]), dim=-1)
