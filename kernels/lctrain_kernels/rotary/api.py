"""Public rotary functions: argument checks, reshaping and the choice of backend."""

from __future__ import annotations

import torch
from torch import Tensor

from lctrain_kernels.checks import has_values, require_tensors
from lctrain_kernels.fused_backend import FusedCall, fused_backend
from lctrain_kernels.rotary import operators
from lctrain_kernels.rotary.options import RotaryOptions


def rotary_table(
    inv_freq: Tensor, positions: Tensor, scale: float = 1.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Returns cos and sin of the angles `position * inv_freq`, computed in float64.

    In float32 an angle would be wrong by 0.06 radians at position 1,000,000.

    Args:
        inv_freq: RoPE frequencies [R / 2] of R rotated columns, floating point, in radians per
            position.
        positions: Positions of the tokens, [T], integers.
        scale: Factor of both cos and sin (YaRN's attention factor).
        dtype: Dtype of cos and sin.

    Returns:
        cos and sin, each [T, R / 2] in `dtype`.

    Raises:
        ValueError: if the positions are no integers [T].
    """
    require_tensors(inv_freq=inv_freq, positions=positions)
    if positions.is_floating_point() or positions.dtype == torch.bool or positions.dim() != 1:
        raise ValueError(
            f"positions must be integers [T], got {positions.dtype} of shape "
            f"{tuple(positions.shape)}. Pass one position per token."
        )
    angles = positions.to(torch.float64)[:, None] * inv_freq.to(torch.float64)
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    *,
    position_ids: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Rotates the first R columns of each head by RoPE, and copies the remaining D - R columns.

    Args:
        x: Queries or keys, packed [T, H, D] or padded [B, S, H, D], floating point.
        cos: Cosines [rows, R / 2], one row per position, R at most D.
        sin: Sines [rows, R / 2].
        interleaved: Whether columns 2 i and 2 i + 1 are a pair. Otherwise columns i and i + R / 2
            are a pair.
        position_ids: Row of cos and sin for each token, [T], [B, S] or [1, S], integers. By
            default, a token's index in its sequence, so cos needs as many rows as a sequence has
            tokens.
        backend: Implementation: "auto", "triton" or "pytorch".

    Returns:
        The rotated x, contiguous, in x's dtype. It is computed in float32 and rounded once.

    Raises:
        ValueError: if shapes or dtypes do not fit.
    """
    require_tensors(x=x, cos=cos, sin=sin)
    if x.dim() not in (3, 4) or not x.is_floating_point():
        raise ValueError(
            f"x must be floating point [T, H, D] or [B, S, H, D], got {x.dtype} of shape "
            f"{tuple(x.shape)}. Split the heads before the rotation."
        )
    _check_table(cos, sin, x.shape[-1], x.device, full=False)
    tokens = x.shape[-3]
    if position_ids is None:
        if cos.shape[0] < tokens:
            raise ValueError(
                f"cos must have a row for each of {tokens} positions, got {cos.shape[0]}. Make a "
                "longer table, or pass position_ids."
            )
        cos, sin = cos[:tokens], sin[:tokens]
    else:
        position_ids = _positions(position_ids, x, cos.shape[0])
    flat = x.reshape(-1, *x.shape[-2:])
    backend = fused_backend("rotary", FusedCall(x.device, x.dtype), backend)
    options = RotaryOptions(interleaved, False, 0.0, 0.0, backend)
    out, _ = operators.rotary(
        flat, None, _rows(cos), _rows(sin), position_ids, False, *options.arguments()
    )
    return out.view(x.shape)


def rotate_qk(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Rotates queries and keys in one kernel, by cos and sin in the layout of transformers.

    Args:
        q: Queries [B, S, Hq, D], floating point.
        k: Keys [B, S, Hk, D], in the dtype of q.
        cos: Cosines [B, S, R] or [1, S, R], one for each of the R rotated columns of a head.
        sin: Sines, in the shape of cos.
        backend: Implementation: "auto", "triton" or "pytorch".

    Returns:
        The rotated q and k, contiguous.

    Raises:
        ValueError: if shapes or dtypes do not fit.
    """
    cos, sin = _check_pair(q, k, cos, sin)
    backend = fused_backend("rotary", FusedCall(q.device, q.dtype), backend)
    options = RotaryOptions(False, True, 0.0, 0.0, backend)
    q_out, k_out = operators.rotary(
        q.flatten(0, 1), k.flatten(0, 1), cos, sin, None, False, *options.arguments()
    )
    return q_out.view(q.shape), k_out.view(k.shape)


def qk_norm_rotary(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float = 1e-6,
    *,
    weight_offset: float = 0.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Applies RMSNorm to every head of q and k, and then rotates them like `rotate_qk`.

    One kernel does both. Values are rounded once, after the rotation.

    Args:
        q: Queries [B, S, Hq, D], floating point.
        k: Keys [B, S, Hk, D], in the dtype of q.
        q_weight: Weight of the queries' norm, [D].
        k_weight: Weight of the keys' norm, [D].
        cos: Cosines [B, S, R] or [1, S, R], one for each of the R rotated columns of a head.
        sin: Sines, in the shape of cos.
        eps: Epsilon that is added to the mean square.
        weight_offset: Number that is added to both weights; 1 for Gemma.
        backend: Implementation: "auto", "triton" or "pytorch".

    Returns:
        The normalised and rotated q and k, contiguous.

    Raises:
        ValueError: if shapes or dtypes do not fit.
    """
    cos, sin = _check_pair(q, k, cos, sin)
    require_tensors(q_weight=q_weight, k_weight=k_weight)
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight.shape != q.shape[-1:]:
            raise ValueError(
                f"{name} must have shape ({q.shape[-1]},), got {tuple(weight.shape)}. "
                "Pass one value per column of a head."
            )
    backend = fused_backend("qk_norm_rotary", FusedCall(q.device, q.dtype), backend)
    options = RotaryOptions(False, True, float(eps), float(weight_offset), backend)
    q_out, k_out = operators.qk_norm_rotary(
        q.flatten(0, 1), k.flatten(0, 1), q_weight, k_weight, cos, sin, None, *options.arguments()
    )
    return q_out.view(q.shape), k_out.view(k.shape)


def _check_pair(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Checks q, k, cos and sin, and returns cos and sin as [rows, R].

    There is one row per token, or one per position if all sequences share them.
    """
    require_tensors(q=q, k=k, cos=cos, sin=sin)
    fits = q.dim() == k.dim() == 4 and q.shape[:2] == k.shape[:2] and q.shape[3] == k.shape[3]
    if not fits or q.dtype != k.dtype or not q.is_floating_point():
        raise ValueError(
            "q and k must be floating point [B, S, H, D] of one dtype, got "
            f"{tuple(q.shape)} {q.dtype} and {tuple(k.shape)} {k.dtype}. Transpose or convert them."
        )
    if cos.dim() != 3 or cos.shape[:2] not in ((1, q.shape[1]), q.shape[:2]):
        raise ValueError(
            f"cos must be [1 or {q.shape[0]}, {q.shape[1]}, R], got {tuple(cos.shape)}. Pass one "
            "row per position."
        )
    cos, sin = cos.flatten(0, 1), sin.flatten(0, 1)
    _check_table(cos, sin, q.shape[-1], q.device, full=True)
    return _rows(cos), _rows(sin)


def _check_table(
    cos: Tensor, sin: Tensor, head_dim: int, device: torch.device, *, full: bool
) -> None:
    rotary = cos.shape[-1] * (1 if full else 2)
    if cos.dim() != 2 or cos.shape != sin.shape or rotary > head_dim or rotary % 2:
        raise ValueError(
            f"cos and sin must be [rows, {'R' if full else 'R / 2'}] with even R at most "
            f"{head_dim}, got {tuple(cos.shape)} and {tuple(sin.shape)}. Cut the tables."
        )
    if cos.device != device or sin.device != device:
        raise ValueError(f"cos and sin must be on {device}, got {cos.device}. Move them.")


def _positions(position_ids: Tensor, x: Tensor, rows: int) -> Tensor:
    batch = (x.shape[0], x.shape[1]) if x.dim() == 4 else (x.shape[0],)
    allowed = (batch, (1, *batch[1:])) if x.dim() == 4 else (batch, (1, *batch))
    is_whole = not position_ids.is_floating_point() and position_ids.dtype != torch.bool
    if tuple(position_ids.shape) not in allowed or not is_whole:
        raise ValueError(
            f"position_ids must be integers of shape {batch}, got {position_ids.dtype} of shape "
            f"{tuple(position_ids.shape)}. Pass one position per token."
        )
    if has_values(position_ids) and position_ids.numel():
        low, high = (int(end) for end in position_ids.aminmax())
        if low < 0 or high >= rows:
            raise ValueError(
                f"position_ids must be from 0 to {rows - 1}, the rows of cos, got {low} to {high}. "
                "Make a longer table."
            )
    return position_ids.to(torch.int64).expand(batch).reshape(-1)


def _rows(table: Tensor) -> Tensor:
    return table if table.stride(-1) == 1 else table.contiguous()
