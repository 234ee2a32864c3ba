"""Launches the portable backward of differential attention: the dq kernel, then dk and dv.

No program adds to results of another program, so every run gives the same bits.
"""

import torch
from torch import Tensor

from lctrain_kernels.differential.triton_dkv import DkvPointers, DkvStrides, differential_dkv_kernel
from lctrain_kernels.differential.triton_dq import DqPointers, DqStrides, differential_dq_kernel
from lctrain_kernels.launch import launch
from lctrain_kernels.options import AttentionOptions
from lctrain_kernels.pack import TiledPack
from lctrain_kernels.schedule import SCHEDULE_ROWS
from lctrain_kernels.tile.arguments import (
    DOT_PRECISION,
    dropout_arguments,
    dropout_tensors,
    token_head_strides,
    window_arguments,
)
from lctrain_kernels.tile.config import tile_config
from lctrain_kernels.tile.structures import Flags, tile_shape


def differential_bwd(
    dout: Tensor,
    dlse1: Tensor | None,
    dlse2: Tensor | None,
    q1: Tensor,
    q2: Tensor,
    k1: Tensor,
    k2: Tensor | None,
    v: Tensor,
    lam: Tensor,
    out1: Tensor,
    out2: Tensor,
    lse1: Tensor,
    lse2: Tensor,
    pack: TiledPack,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launches the two backward kernels.

    Args:
        dout: Gradient of out, [T, H, Dv], any strides.
        dlse1: Gradient of lse1, [H, T] float32, or None.
        dlse2: Gradient of lse2, [H, T] float32, or None.
        q1: Packed queries of branch 1, [T, H, D].
        q2: Packed queries of branch 2, [T, H, D].
        k1: Packed keys of branch 1, [Tk, Hk, D].
        k2: Packed keys of branch 2, [Tk, Hk, D]; None if both branches read k1.
        v: Packed values [Tk, Hk, Dv].
        lam: Lambda of each token and head, [T, H] float32, any strides. With stride 0 along T, the
            kernels read one number per head instead of one per query.
        out1: Output A1 v of branch 1, [T, H, Dv], contiguous.
        out2: Output A2 v of branch 2, [T, H, Dv], contiguous.
        lse1: Log-sum-exp of branch 1, [H, T] float32.
        lse2: Log-sum-exp of branch 2, [H, T] float32.
        pack: Boundaries of the documents, with their tile schedule.
        options: Mask, scale and the other attention options of the call.

    Returns:
        dq1 and dq2 [T, H, D], dk1 and dk2 [Tk, Hk, D], dv [Tk, Hk, Dv], contiguous, and dlam [H, T]
        float32. If k2 is None, dk1 is the gradient of the shared k, and dk2 is an empty tensor.
    """
    total_q, heads, head_dim = q1.shape
    heads_kv, value_dim = v.shape[1:]
    group = heads // heads_kv
    device = q1.device
    dout = dout if dout.stride(2) == 1 else dout.contiguous()
    dlse1 = None if dlse1 is None else dlse1.contiguous()
    dlse2 = None if dlse2 is None else dlse2.contiguous()
    dq1 = torch.empty(q1.shape, dtype=q1.dtype, device=device)
    dq2 = torch.empty_like(dq1)
    dk1 = torch.empty(k1.shape, dtype=k1.dtype, device=device)
    dk2 = torch.empty(0 if k2 is None else k2.shape, dtype=k1.dtype, device=device)
    dv = torch.empty(v.shape, dtype=v.dtype, device=device)
    dlam = torch.empty((heads, total_q), dtype=torch.float32, device=device)
    if total_q == 0:  # no query and no lambda to read
        return dq1, dq2, dk1.zero_(), dk2.zero_(), dv.zero_(), dlam
    per_token = lam.stride(0) != 0
    stats_width = 8 if per_token else 4
    stats = torch.empty((heads, total_q, stats_width), dtype=torch.float32, device=device)
    window_ptr, left, right, has_left, has_right = window_arguments(options)
    threshold, scale_kept, first_head = dropout_arguments(options)
    flags = Flags(has_left=has_left, has_right=has_right, has_dropout=options.has_dropout)
    input_strides = token_head_strides(q1, q2, k1, k1 if k2 is None else k2, v)
    numbers = (total_q, left, right, options.softmax_scale, threshold, scale_kept, first_head)
    config = tile_config("diff_dq", q1, group, options.has_dropout, value_dim, k2 is None)
    parts = SCHEDULE_ROWS // config.positions * (group // config.pack)
    grid = (heads_kv * pack.q_tiles.shape[0] * parts,)
    if grid[0] > 0:
        launch(differential_dq_kernel, grid)(
            DqPointers(
                q1,
                q2,
                k1,
                k2,
                v,
                lam,
                out1,
                out2,
                dout,
                lse1,
                lse2,
                dlse1,
                dlse2,
                dq1,
                dq2,
                dlam,
                stats,
                pack.cu_seqlens_q,
                pack.cu_seqlens_k,
                pack.q_tiles,
                window_ptr,
                *dropout_tensors(options, pack),
            ),
            DqStrides._make((*input_strides, *lam.stride(), *token_head_strides(out1, dout, dq1))),
            pack.q_tiles.shape[0],
            *numbers,
            TILE=tile_shape(config, head_dim, group, value_dim),
            FLAGS=flags,
            STATS=stats_width,
            SHARED_K=k2 is None,
            PRECISION=DOT_PRECISION,
            **config.options,
        )
    config = tile_config("diff_dkv", q1, group, options.has_dropout, value_dim, k2 is None)
    grid = (heads_kv * pack.k_tiles.shape[0] * (SCHEDULE_ROWS // config.block_n),)
    if grid[0] > 0:
        launch(differential_dkv_kernel, grid)(
            DkvPointers(
                q1,
                q2,
                k1,
                k2,
                v,
                lam,
                dout,
                stats,
                dk1,
                None if k2 is None else dk2,
                dv,
                pack.cu_seqlens_q,
                pack.cu_seqlens_k,
                pack.k_tiles,
                window_ptr,
                *dropout_tensors(options, pack),
            ),
            DkvStrides._make((*input_strides, lam.stride(1), *token_head_strides(dout, dk1, dv))),
            pack.k_tiles.shape[0],
            *numbers,
            TILE=tile_shape(config, head_dim, group, value_dim),
            FLAGS=flags,
            STATS=stats_width,
            SHARED_K=k2 is None,
            PRECISION=DOT_PRECISION,
            **config.options,
        )
    return dq1, dq2, dk1, dk2, dv, dlam
