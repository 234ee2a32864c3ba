"""Backward of dual chunk attention: rotates queries and keys, then launches the other kernels.

Nothing is added across programs, so the result has the same bits in every run.
"""

from typing import Any

import torch
from torch import Tensor

from lctrain_kernels.dual_chunk.triton_dkv import DkvPointers, DkvStrides, dual_chunk_dkv_kernel
from lctrain_kernels.dual_chunk.triton_dq import DqPointers, DqStrides, dual_chunk_dq_kernel
from lctrain_kernels.dual_chunk.triton_rotate import dual_chunk_rotate, rotated_keys
from lctrain_kernels.schedule import SCHEDULE_ROWS
from lctrain_kernels.tile.arguments import DOT_PRECISION, dropout_arguments, token_head_strides
from lctrain_kernels.tile.config import tile_config
from lctrain_kernels.tile.structures import Flags, tile_shape


def dual_chunk_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    q_tiles: Tensor,
    k_tiles: Tensor,
    *,
    inv_freq: Tensor,
    logit_scale: Tensor | None,
    chunk_length: int,
    succ_length: int,
    inter_position: int,
    softmax_scale: float,
    dropout_p: float,
    dropout_seed: Tensor | None,
    document_ids: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the backward kernels; arguments as dual_chunk_fwd.

    Scratch: keys rotated by -c [Tk, Hk, D], and four float32 per query and head.

    Args:
        dout: [T, H, D], any strides.
        dlse: [H, T] float32 or None.
        q: [T, H, D].
        k: [Tk, Hk, D].
        v: [Tk, Hk, D].
        out: [T, H, D].
        lse: [H, T] float32.
        cu_seqlens_q: [N + 1] int32.
        cu_seqlens_k: [N + 1] int32.
        q_tiles: [n, 2] int32.
        k_tiles: [m, 2] int32.
        inv_freq: [D/2] float32.
        logit_scale: [N] float32.
        chunk_length: c.
        near: As in dual_chunk_fwd.
        far_position: Likewise.
        softmax_scale: Positive factor of q.k.
        dropout_p: In [0, 1).
        dropout_seed: [1] int64.
        document_ids: [N] int32.

    Returns:
        dq [T, H, D], dk and dv [Tk, Hk, D], contiguous.
    """
    total_q, heads, head_dim = q.shape
    heads_kv = k.shape[1]
    group = heads // heads_kv
    dout = dout if dout.stride(2) == 1 else dout.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    geometry: dict[str, Any] = {
        "inv_freq": inv_freq,
        "chunk_length": chunk_length,
        "succ_length": succ_length,
        "inter_position": inter_position,
    }
    threshold, scale_kept = dropout_arguments(dropout_p)
    k_succ = rotated_keys(k, cu_seqlens_k, k_tiles, **geometry)
    stats = torch.empty((heads, total_q, 4), dtype=torch.float32, device=q.device)
    # Holds the queries at the far position until the kernels of dq have read them.
    dq = torch.empty((total_q, heads, head_dim), dtype=q.dtype, device=q.device)
    dual_chunk_rotate(
        q,
        dq,
        cu_seqlens_q,
        cu_seqlens_k,
        q_tiles,
        is_query=True,
        out=out,
        dout=dout,
        lse=lse,
        dlse=dlse,
        stats=stats,
        scale_kept=scale_kept,
        **geometry,
    )
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    flags = Flags(has_dropout=dropout_p > 0)
    for is_succ in (True, False):
        config = tile_config("dual_chunk_dkv", q, group, dropout_p > 0, is_share=is_succ)
        grid = (heads_kv * k_tiles.shape[0] * (SCHEDULE_ROWS // config.block_n),)
        if grid[0] == 0:
            continue
        dual_chunk_dkv_kernel[grid](
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
                cu_seqlens_q,
                cu_seqlens_k,
                k_tiles,
                inv_freq,
                logit_scale,
                dropout_seed,
                document_ids,
            ),
            DkvStrides(*token_head_strides(q, dq, k, k_succ, v, dout, dk)),
            k_tiles.shape[0],
            total_q,
            chunk_length,
            succ_length,
            softmax_scale,
            threshold,
            scale_kept,
            TILE=tile_shape(config, head_dim, group),
            FLAGS=flags,
            IS_SUCC=is_succ,
            PRECISION=DOT_PRECISION,
            **config.options,
        )
    for is_inter in (True, False):
        config = tile_config("dual_chunk_dq", q, group, dropout_p > 0, is_share=is_inter)
        parts = SCHEDULE_ROWS // config.positions * (group // config.pack)
        grid = (heads_kv * q_tiles.shape[0] * parts,)
        if grid[0] == 0:
            continue
        dual_chunk_dq_kernel[grid](
            DqPointers(
                q,
                k,
                k_succ,
                v,
                dout,
                stats,
                dq,
                cu_seqlens_q,
                cu_seqlens_k,
                q_tiles,
                inv_freq,
                logit_scale,
                dropout_seed,
                document_ids,
            ),
            DqStrides(*token_head_strides(q, k, k_succ, v, dout, dq)),
            q_tiles.shape[0],
            total_q,
            chunk_length,
            succ_length,
            inter_position,
            softmax_scale,
            threshold,
            scale_kept,
            TILE=tile_shape(config, head_dim, group),
            FLAGS=flags,
            IS_INTER=is_inter,
            PRECISION=DOT_PRECISION,
            **config.options,
        )
    return dq, dk, dv
