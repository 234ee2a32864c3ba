"""Launches the portable backward of varlen attention: the dq kernel, then the dk, dv kernel.

No program adds to results of another program, so every run gives the same bits.
"""

import torch
from torch import Tensor

from lctrain_kernels.launch import launch
from lctrain_kernels.options import AttentionOptions
from lctrain_kernels.pack import TiledPack
from lctrain_kernels.schedule import SCHEDULE_ROWS
from lctrain_kernels.tile.arguments import (
    DOT_PRECISION,
    alibi_strides,
    dropout_arguments,
    dropout_tensors,
    token_head_strides,
    window_arguments,
)
from lctrain_kernels.tile.config import tile_config
from lctrain_kernels.tile.structures import Flags, tile_shape
from lctrain_kernels.varlen.triton_dkv import DkvPointers, DkvStrides, varlen_dkv_kernel
from lctrain_kernels.varlen.triton_dq import DqPointers, DqStrides, varlen_dq_kernel


def varlen_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    pack: TiledPack,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launches the two backward kernels.

    Args:
        dout: Gradient of out, [T, H, D], any strides.
        dlse: Gradient of lse, [H, T] float32, or None.
        q: Packed queries [T, H, D].
        k: Packed keys [Tk, Hk, D].
        v: Packed values [Tk, Hk, D].
        out: Output of the forward, [T, H, D].
        lse: Log-sum-exp of the forward, [H, T] float32.
        pack: Boundaries of the documents, with their tile schedule.
        options: Mask, scale and the other attention options of the call.

    Returns:
        dq [T, H, D], dk and dv [Tk, Hk, D], contiguous, and delta [H, T] float32.
    """
    total_q, heads, head_dim = q.shape
    heads_kv = k.shape[1]
    group = heads // heads_kv
    dout = dout if dout.stride(2) == 1 else dout.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    dq = torch.empty((total_q, heads, head_dim), dtype=q.dtype, device=q.device)
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    delta = torch.empty((heads, total_q), dtype=torch.float32, device=q.device)
    stats = torch.empty((heads, total_q, 4), dtype=torch.float32, device=q.device)
    window_ptr, left, right, has_left, has_right = window_arguments(options)
    threshold, scale_kept, first_head = dropout_arguments(options)
    flags = Flags(
        has_left=has_left,
        has_right=has_right,
        has_softcap=options.softcap > 0,
        has_alibi=options.alibi_slopes is not None,
        has_dropout=options.has_dropout,
    )
    numbers = (
        total_q,
        left,
        right,
        options.softmax_scale,
        options.softcap,
        threshold,
        scale_kept,
        first_head,
    )
    config = tile_config("varlen_dq", q, group, options.has_dropout)
    parts = SCHEDULE_ROWS // config.positions * (group // config.pack)
    grid = (heads_kv * pack.q_tiles.shape[0] * parts,)
    if grid[0] > 0:
        launch(varlen_dq_kernel, grid)(
            DqPointers(
                q,
                k,
                v,
                out,
                dout,
                lse,
                dlse,
                dq,
                delta,
                stats,
                pack.cu_seqlens_q,
                pack.cu_seqlens_k,
                pack.q_tiles,
                window_ptr,
                options.alibi_slopes,
                *dropout_tensors(options, pack),
            ),
            DqStrides(*token_head_strides(q, k, v, out, dout, dq)),
            alibi_strides(options.alibi_slopes),
            pack.q_tiles.shape[0],
            *numbers,
            TILE=tile_shape(config, head_dim, group),
            FLAGS=flags,
            PRECISION=DOT_PRECISION,
            **config.options,
        )
    config = tile_config("varlen_dkv", q, group, options.has_dropout)
    grid = (heads_kv * pack.k_tiles.shape[0] * (SCHEDULE_ROWS // config.block_n),)
    if grid[0] > 0:
        launch(varlen_dkv_kernel, grid)(
            DkvPointers(
                q,
                k,
                v,
                dout,
                stats,
                dk,
                dv,
                pack.cu_seqlens_q,
                pack.cu_seqlens_k,
                pack.k_tiles,
                window_ptr,
                options.alibi_slopes,
                *dropout_tensors(options, pack),
            ),
            DkvStrides(*token_head_strides(q, k, v, dout, dk)),
            alibi_strides(options.alibi_slopes),
            pack.k_tiles.shape[0],
            *numbers,
            TILE=tile_shape(config, head_dim, group),
            FLAGS=flags,
            PRECISION=DOT_PRECISION,
            **config.options,
        )
    return dq, dk, dv, delta
