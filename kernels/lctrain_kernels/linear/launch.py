"""Launches batch_invariant_linear_kernel."""

from __future__ import annotations

from torch import Tensor

from lctrain_kernels.launch import cdiv, launch
from lctrain_kernels.linear.launch_config import linear_tile
from lctrain_kernels.linear.triton_kernels import batch_invariant_linear_kernel
from lctrain_kernels.tile.arguments import DOT_PRECISION


def linear_into(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Computes out = x @ weight.T + bias.

    Args:
        x: Inputs [T, K].
        weight: Weight [N, K], in the dtype of x.
        bias: Bias [N], or None.
        out: Result [T, N], any dtype; its columns are contiguous.
    """
    rows, width = x.shape
    columns = weight.shape[0]
    if not rows or not columns:
        return
    if out.stride(1) != 1:
        raise ValueError(f"out must have contiguous columns, got strides {out.stride()}.")
    tile = linear_tile(x, columns)
    grid = (cdiv(rows, tile.block_m) * cdiv(columns, tile.block_n),)
    launch(batch_invariant_linear_kernel, grid)(
        x.contiguous(),
        weight.contiguous(),
        bias,
        out,
        rows,
        columns,
        width,
        out.stride(0),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GROUP=tile.group,
        EVEN_K=width % tile.block_k == 0,
        STAGES=tile.stages,
        PRECISION=DOT_PRECISION,
        num_warps=tile.num_warps,
        enable_fp_fusion=True,
    )
