"""Launches the portable backward of dual chunk attention: rotations, dq, then dk and dv.

No program adds to results of another program, so every run gives the same bits.
"""

import torch
from torch import Tensor

from lctrain_kernels.dual_chunk.operands import Operands, Rotation
from lctrain_kernels.dual_chunk.triton_dkv import DkvPointers, DkvStrides, dual_chunk_dkv_kernel
from lctrain_kernels.dual_chunk.triton_dq import DqPointers, DqStrides, dual_chunk_dq_kernel
from lctrain_kernels.dual_chunk.triton_rotate import dual_chunk_rotate, rotated_keys
from lctrain_kernels.launch import launch
from lctrain_kernels.options import AttentionOptions
from lctrain_kernels.pack import TiledPack
from lctrain_kernels.schedule import SCHEDULE_ROWS
from lctrain_kernels.tile.arguments import (
    DOT_PRECISION,
    dropout_arguments,
    dropout_tensors,
    token_head_strides,
)
from lctrain_kernels.tile.config import tile_config
from lctrain_kernels.tile.structures import Flags, tile_shape


def dual_chunk_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    operands: Operands,
    rotation: Rotation,
    out: Tensor,
    lse: Tensor,
    pack: TiledPack,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the portable kernels of the backward: rotations, dq (twice), and dk, dv (twice).

    Scratch memory: keys rotated by -c [Tk, Hk, D], and four float32 per query and head.

    Args:
        dout: Gradient of out, [T, H, D], any strides.
        dlse: Gradient of lse, [H, T] float32, or None.
        operands: Queries, keys, values and the other inputs of the operator.
        rotation: Rotation of queries and keys.
        out: Output of the forward, [T, H, D].
        lse: Log-sum-exp of the forward, [H, T] float32.
        pack: Boundaries of the documents, with their tile schedule.
        options: Mask, scale and the other attention options of the call.

    Returns:
        dq [T, H, D], dk and dv [Tk, Hk, D], contiguous.
    """
    q, k, v = operands.q, operands.k, operands.v
    total_q, heads, head_dim = q.shape
    heads_kv = k.shape[1]
    group = heads // heads_kv
    dout = dout if dout.stride(2) == 1 else dout.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    threshold, scale_kept, first_head = dropout_arguments(options)
    k_succ = rotated_keys(k, pack.cu_seqlens_k, pack.k_tiles, rotation=rotation)
    stats = torch.empty((heads, total_q, 4), dtype=torch.float32, device=q.device)
    # dq holds the queries at the inter position until the dq kernels have read them.
    dq = torch.empty((total_q, heads, head_dim), dtype=q.dtype, device=q.device)
    dual_chunk_rotate(
        q,
        dq,
        pack.cu_seqlens_q,
        pack.cu_seqlens_k,
        pack.q_tiles,
        is_query=True,
        out=out,
        dout=dout,
        lse=lse,
        dlse=dlse,
        stats=stats,
        scale_kept=scale_kept,
        rotation=rotation,
    )
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    flags = Flags(has_dropout=options.has_dropout)
    for is_succ in (True, False):
        config = tile_config("dual_chunk_dkv", q, group, options.has_dropout, is_partial=is_succ)
        grid = (heads_kv * pack.k_tiles.shape[0] * (SCHEDULE_ROWS // config.block_n),)
        if grid[0] == 0:
            continue
        launch(dual_chunk_dkv_kernel, grid)(
            DkvPointers(
                q,
                dq,
                k,
                k_succ,
                v,
                dout,
                stats,
                dk,
                dv,
                pack.cu_seqlens_q,
                pack.cu_seqlens_k,
                pack.k_tiles,
                rotation.inv_freq,
                operands.logit_scale,
                *dropout_tensors(options, pack),
            ),
            DkvStrides(*token_head_strides(q, dq, k, k_succ, v, dout, dk)),
            pack.k_tiles.shape[0],
            total_q,
            rotation.chunk_length,
            rotation.succ_length,
            options.softmax_scale,
            threshold,
            scale_kept,
            first_head,
            TILE=tile_shape(config, head_dim, group),
            FLAGS=flags,
            IS_SUCC=is_succ,
            PRECISION=DOT_PRECISION,
            **config.options,
        )
    for is_inter in (True, False):
        config = tile_config("dual_chunk_dq", q, group, options.has_dropout, is_partial=is_inter)
        parts = SCHEDULE_ROWS // config.positions * (group // config.pack)
        grid = (heads_kv * pack.q_tiles.shape[0] * parts,)
        if grid[0] == 0:
            continue
        launch(dual_chunk_dq_kernel, grid)(
            DqPointers(
                q,
                k,
                k_succ,
                v,
                dout,
                stats,
                dq,
                pack.cu_seqlens_q,
                pack.cu_seqlens_k,
                pack.q_tiles,
                rotation.inv_freq,
                operands.logit_scale,
                *dropout_tensors(options, pack),
            ),
            DqStrides(*token_head_strides(q, k, k_succ, v, dout, dq)),
            pack.q_tiles.shape[0],
            total_q,
            rotation.chunk_length,
            rotation.succ_length,
            rotation.inter_position,
            options.softmax_scale,
            threshold,
            scale_kept,
            first_head,
            TILE=tile_shape(config, head_dim, group),
            FLAGS=flags,
            IS_INTER=is_inter,
            PRECISION=DOT_PRECISION,
            **config.options,
        )
    return dq, dk, dv
