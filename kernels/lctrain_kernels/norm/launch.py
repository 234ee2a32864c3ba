"""Launches the Triton kernels of the norms. norm_fwd and norm_bwd match those of `reference`."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

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
        x: Hidden states [T, H]; any row stride, column stride 1.
        residual: Residual stream [T, H], any row stride, column stride 1; or None.
        weight: Weight of the norm, [H].
        bias: Bias of the norm, [H], or None.
        options: Epsilon and kind of the norm.
        config: Launch configuration that replaces the table's.

    Returns:
        The normalised rows [T, H]; the sum x + residual [T, H] (an empty tensor without a
        residual); the mean [T] (empty for RMSNorm) and 1 / standard deviation [T], float32.
    """
    rows, columns = x.shape
    block = triton.next_power_of_2(columns)
    config = norm_config(FORWARD, block) if config is None else config
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = torch.empty(rows, columns, dtype=options.out_dtype(dtype, weight.dtype), device=x.device)
    total = x.new_empty(0 if residual is None else (rows, columns), dtype=dtype)
    mean = x.new_empty(rows if options.centered else 0, dtype=torch.float32)
    rstd = x.new_empty(rows, dtype=torch.float32)
    if rows:
        norm_fwd_kernel[(triton.cdiv(rows, config.rows),)](
            x,
            residual,
            weight,
            bias,
            y,
            total,
            mean,
            rstd,
            rows,
            x.stride(0),
            0 if residual is None else residual.stride(0),
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

    Arguments and results are those of `reference.norm_bwd`. `config` replaces the table's launch
    configuration.
    """
    rows, columns = x.shape
    block = triton.next_power_of_2(columns)
    config = norm_config(BACKWARD, block) if config is None else config
    groups = triton.cdiv(rows, config.rows)
    programs = max(min(groups, config.programs * multiprocessors(x.device)), 1)
    dx = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    parts = torch.empty(1 + needs_bias, programs, columns, dtype=torch.float32, device=x.device)
    norm_bwd_kernel[(programs,)](
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
        dy.stride(0),
        0 if dsum is None else dsum.stride(0),
        x.stride(0),
        options.weight_offset,
        COLUMNS=columns,
        BLOCK=block,
        ROWS=config.rows,
        STAGES=config.stages,
        CENTERED=options.centered,
        num_warps=config.num_warps,
        enable_fp_fusion=True,
    )
    empty = weight.new_empty(0)
    dweight = column_sum(parts[0], weight.dtype) if needs_weight else empty
    return dx, dweight, column_sum(parts[1], weight.dtype) if needs_bias else empty


def column_sum(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the sum over the first dimension of `parts` [P, N], as [N] in `dtype`.

    `parts` is float32 and contiguous.
    """
    num_parts, columns = parts.shape
    out = torch.empty(columns, dtype=dtype, device=parts.device)
    column_sum_kernel[(triton.cdiv(columns, SUM_BLOCK),)](
        parts,
        out,
        num_parts,
        COLUMNS=columns,
        BLOCK=SUM_BLOCK,
        PARTS=SUM_PARTS,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out


def rows_of(tensor: Tensor, columns: int) -> Tensor:
    """Returns a tensor [..., columns] as [T, columns] with column stride 1; copies if needed."""
    flat = tensor.reshape(math.prod(tensor.shape[:-1]), columns)
    return flat if flat.stride(1) == 1 or columns == 1 else flat.contiguous()
