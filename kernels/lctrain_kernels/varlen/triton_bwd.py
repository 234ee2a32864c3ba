"""Backward of varlen attention: launches the kernel of dq, then that of dk and dv.

Nothing is added across programs, so the result has the same bits in every run.
"""

import torch
from torch import Tensor

from lctrain_kernels.schedule import SCHEDULE_ROWS
from lctrain_kernels.tile.arguments import (
    DOT_PRECISION,
    alibi_strides,
    dropout_arguments,
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
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    q_tiles: Tensor,
    k_tiles: Tensor,
    *,
    softmax_scale: float,
    window: tuple[int, int] | Tensor,
    softcap: float,
    alibi_slopes: Tensor | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
    document_ids: Tensor | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launches the two backward kernels; arguments as varlen_fwd.

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
        softmax_scale: Positive factor of q.k.
        window: (left, right), -1 unbounded, or an int32 tensor [2].
        softcap: c; 0 turns it off.
        alibi_slopes: [H] or [N, H] float32.
        dropout_p: In [0, 1).
        dropout_seed: [1] int64.
        document_ids: [N] int32.
        deterministic: Without effect: these kernels always are.

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
    window_ptr, left, right, has_left, has_right = window_arguments(window)
    threshold, scale_kept = dropout_arguments(dropout_p)
    flags = Flags(
        has_left=has_left,
        has_right=has_right,
        has_softcap=softcap > 0,
        has_alibi=alibi_slopes is not None,
        has_dropout=dropout_p > 0,
    )
    numbers = (total_q, left, right, softmax_scale, softcap, threshold, scale_kept)
    config = tile_config("varlen_dq", q, group, dropout_p > 0)
    parts = SCHEDULE_ROWS // config.positions * (group // config.pack)
    grid = (heads_kv * q_tiles.shape[0] * parts,)
    if grid[0] > 0:
        varlen_dq_kernel[grid](
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
                cu_seqlens_q,
                cu_seqlens_k,
                q_tiles,
                window_ptr,
                alibi_slopes,
                dropout_seed,
                document_ids,
            ),
            DqStrides(*token_head_strides(q, k, v, out, dout, dq)),
            alibi_strides(alibi_slopes),
            q_tiles.shape[0],
            *numbers,
            TILE=tile_shape(config, head_dim, group),
            FLAGS=flags,
            PRECISION=DOT_PRECISION,
            **config.options,
        )
    config = tile_config("varlen_dkv", q, group, dropout_p > 0)
    grid = (heads_kv * k_tiles.shape[0] * (SCHEDULE_ROWS // config.block_n),)
    if grid[0] > 0:
        varlen_dkv_kernel[grid](
            DkvPointers(
                q,
                k,
                v,
                dout,
                stats,
                dk,
                dv,
                cu_seqlens_q,
                cu_seqlens_k,
                k_tiles,
                window_ptr,
                alibi_slopes,
                dropout_seed,
                document_ids,
            ),
            DkvStrides(*token_head_strides(q, k, v, dout, dk)),
            alibi_strides(alibi_slopes),
            k_tiles.shape[0],
            *numbers,
            TILE=tile_shape(config, head_dim, group),
            FLAGS=flags,
            PRECISION=DOT_PRECISION,
            **config.options,
        )
    return dq, dk, dv, delta
