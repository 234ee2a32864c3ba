"""Launches the Triton kernels of the norms. norm_fwd and norm_bwd match those of `reference`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lctrain_kernels.launch import cdiv, launch, next_power_of_2
from lctrain_kernels.multiprocessors import multiprocessors
from lctrain_kernels.norm.config import BACKWARD, FORWARD, NormConfig, norm_config
from lctrain_kernels.norm.options import NormOptions
from lctrain_kernels.norm.triton_kernels import column_sum_kernel, norm_bwd_kernel, norm_fwd_kernel

SUM_BLOCK, SUM_PARTS = 32, 64


def norm_fwd(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    options: NormOptions,
    config: NormConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalises the rows of x, or of x + residual.

    Args:
        x: Hidden states [T, H], any row stride, column stride 1; or [..., H], contiguous.
        residual: Residual stream, in the same form as x; or None.
        weight: Weight of the norm, [H].
        bias: Bias of the norm, [H], or None.
        options: Epsilon and kind of the norm.
        config: Launch configuration that replaces the table's.

    Returns:
        The normalised rows, in the shape of x; the sum x + residual in this shape (an empty tensor
        without a residual); the mean [T] (empty for RMSNorm) and 1 / standard deviation [T],
        float32.
    """
    columns = x.shape[-1]
    rows = math.prod(x.shape[:-1])
    block = next_power_of_2(columns)
    config = norm_config(FORWARD, block) if config is None else config
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = torch.empty(x.shape, dtype=options.out_dtype(dtype, weight.dtype), device=x.device)
    total = x.new_empty(0 if residual is None else x.shape, dtype=dtype)
    mean = x.new_empty(rows if options.centered else 0, dtype=torch.float32)
    rstd = x.new_empty(rows, dtype=torch.float32)
    if rows:
        launch(norm_fwd_kernel, (cdiv(rows, config.rows),))(
            x,
            residual,
            weight,
            bias,
            y,
            total,
            mean,
            rstd,
            rows,
            x.stride(-2),
            0 if residual is None else residual.stride(-2),
            options.eps,
            options.weight_offset,
            COLUMNS=columns,
            BLOCK=block,
            ROWS=config.rows,
            CENTERED=options.centered,
            FLOAT32_PRODUCT=options.float32_product or options.centered,
            num_warps=config.num_warps,
            enable_fp_fusion=True,
        )
    return y, total, mean, rstd


def norm_bwd(
    dy: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    options: NormOptions,
    needs_weight: bool,
    needs_bias: bool,
    config: NormConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of norm_fwd's x, weight and bias.

    Arguments and results are those of `reference.norm_bwd`, but rows may be [..., H], contiguous.
    `config` replaces the table's launch configuration.
    """
    columns = x.shape[-1]
    rows = math.prod(x.shape[:-1])
    block = next_power_of_2(columns)
    config = norm_config(BACKWARD, block) if config is None else config
    groups = cdiv(rows, config.rows)
    programs = max(min(groups, config.programs * multiprocessors(x.device)), 1)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    parts = torch.empty(1 + needs_bias, programs, columns, dtype=torch.float32, device=x.device)
    launch(norm_bwd_kernel, (programs,))(
        dy,
        dsum,
        x,
        weight,
        mean,
        rstd,
        dx,
        parts[0],
        parts[1] if needs_bias else None,
        rows,
        dy.stride(-2),
        0 if dsum is None else dsum.stride(-2),
        x.stride(-2),
        options.weight_offset,
        COLUMNS=columns,
        BLOCK=block,
        ROWS=config.rows,
        STAGES=config.stages,
        CENTERED=options.centered,
        num_warps=config.num_warps,
        enable_fp_fusion=True,
    )
    if needs_weight and needs_bias:
        dweight, dbias = column_sums(parts, weight.dtype)
        return dx, dweight, dbias
    empty = weight.new_empty(0)
    dweight = column_sum(parts[0], weight.dtype) if needs_weight else empty
    return dx, dweight, column_sum(parts[1], weight.dtype) if needs_bias else empty


def column_sum(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the sum over the first dimension of `parts` [P, N], as [N] in `dtype`.

    `parts` is float32 and contiguous.
    """
    return column_sums(parts[None], dtype)[0]


def column_sums(parts: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Returns the sums of one or two groups over the second dimension, each [N] in `dtype`.

    `parts` [groups, P, N] is float32 and contiguous.
    """
    groups, num_parts, columns = parts.shape
    sums = [torch.empty(columns, dtype=dtype, device=parts.device) for _ in range(groups)]
    launch(column_sum_kernel, (cdiv(columns, SUM_BLOCK), groups))(
        parts,
        sums[0],
        sums[1] if groups > 1 else None,
        num_parts,
        COLUMNS=columns,
        BLOCK=SUM_BLOCK,
        PARTS=SUM_PARTS,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return sums
