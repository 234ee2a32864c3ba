"""Forward of dual chunk attention in portable Triton."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lctrain_kernels.dual_chunk.triton_rotate import dual_chunk_rotate, rotated_keys
from lctrain_kernels.schedule import SCHEDULE_ROWS
from lctrain_kernels.tile.arguments import (
    DOT_PRECISION,
    RUNTIME_INTEGERS,
    dropout_arguments,
    padded_head_dim,
)
from lctrain_kernels.tile.chunks import FAR, NEAR, keys_of_query, keys_of_tile
from lctrain_kernels.tile.config import tile_config
from lctrain_kernels.tile.dropout import keep_mask, load_key
from lctrain_kernels.tile.logits import LOG2_E
from lctrain_kernels.tile.mask import mask_logits
from lctrain_kernels.tile.memory import load_rows, store_rows
from lctrain_kernels.tile.rotary import load_pairs, pair_columns
from lctrain_kernels.tile.seqlen import document_bounds, locate_program
from lctrain_kernels.tile.softmax import finish, softmax_step

_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def dual_chunk_fwd_kernel(
    q_ptr,
    k_ptr,
    k_near_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    cu_q_ptr,
    cu_k_ptr,
    tiles_ptr,
    logit_scale_ptr,
    seed_ptr,
    document_ids_ptr,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_nt,
    stride_nh,
    stride_vt,
    stride_vh,
    stride_ot,
    stride_oh,
    num_tiles,
    total_q,
    chunk_length,
    near,
    scale,
    threshold,
    keep_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    PACK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: PACK query heads of one key/value head times BLOCK_M / PACK queries of a
    document.

    One softmax runs over the three ways of tile/chunks.py, each with its own q and k: FAR with
    queries at the far position, NEAR with keys rotated by -c, OWN with both as they are.

    Grid: as varlen_fwd_kernel. q [T, H, D], k and v [Tk, Hk, D], k_near [Tk, Hk, D] as
    dual_chunk_rotate writes it, out [T, H, D], lse [H, T] float32, logit_scale [N] float32. out
    holds the queries at the far position when the kernel begins: each program reads its own rows
    before it writes them.
    """
    POSITIONS: tl.constexpr = BLOCK_M // PACK
    head_kv, head_group, document, first = locate_program(
        tiles_ptr, num_tiles, POSITIONS, GROUP // PACK
    )
    if document < 0:
        return
    begin_q, length_q = document_bounds(cu_q_ptr, document)
    begin_k, length_k = document_bounds(cu_k_ptr, document)
    if first >= length_q:
        return
    shift = length_k - length_q
    last = tl.minimum(first + POSITIONS, length_q) - 1 + shift

    local_m = tl.arange(0, BLOCK_M)
    local_n = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_D)
    pairs = pair_columns(HEAD_DIM, BLOCK_D)
    local_query = local_m % POSITIONS
    query = first + local_query
    tile_head = head_kv * GROUP + head_group * PACK + local_m // POSITIONS
    head = tl.where(query < length_q, tile_head, 0).to(tl.int64)
    token = begin_q + query
    k_own = k_ptr + begin_k * stride_kt + head_kv.to(tl.int64) * stride_kh
    k_near = k_near_ptr + begin_k * stride_nt + head_kv.to(tl.int64) * stride_nh
    v_base = v_ptr + begin_k * stride_vt + head_kv.to(tl.int64) * stride_vh
    tile_v = local_n[:, None] * stride_vt + columns[None, :]
    key_0 = 0
    key_1 = 0
    document_key = 0
    if HAS_DROPOUT:
        key_0, key_1, document_key = load_key(seed_ptr, document_ids_ptr, document)
    multiplier = scale * _LOG2_E
    if logit_scale_ptr is not None:
        multiplier *= tl.load(logit_scale_ptr + document)
    position = query + shift

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for way in tl.range(0, 3):
        low, clear, high = keys_of_tile(
            first + shift, last, way, chunk_length, near, BLOCK_N, HAS_DROPOUT
        )
        if low < high:
            # Strides that depend on the way keep LLVM from holding both rows of pointers in
            # registers throughout the loops.
            row = token * tl.where(way == FAR, stride_ot, stride_qt)
            row += head * tl.where(way == FAR, stride_oh, stride_qh)
            q = load_pairs(
                tl.where(way == FAR, out_ptr, q_ptr) + row[:, None] + pairs[None, :],
                query,
                length_q,
                HEAD_DIM,
                BLOCK_D,
                True,
            )
            first_seen, last_seen = keys_of_query(position, way, chunk_length, near)
            stride_k = tl.where(way == NEAR, stride_nt, stride_kt)
            k_base = tl.where(way == NEAR, k_near, k_own)
            tile_k = local_n[:, None] * stride_k + pairs[None, :]
            # Tiles without a mask, then those with one.
            for part in tl.static_range(0, 2):
                begin = low if part == 0 else clear
                end = clear if part == 0 else high
                # The branch keeps the accumulator of an empty range out of the loop's pipeline of
                # products, and pointers advance by addition; without either ptxas may serialise
                # the products (C7515).
                if begin < end:
                    k_tile = k_base + tl.cast(begin, tl.int64) * stride_k
                    v_tile = v_base + tl.cast(begin, tl.int64) * stride_vt
                    for n in tl.range(begin, end, BLOCK_N):
                        key = n + local_n
                        k = load_pairs(k_tile + tile_k, key, length_k, HEAD_DIM, BLOCK_D, part == 1)
                        x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
                        if part == 1:
                            x = mask_logits(
                                x, local_n[None, :], first_seen - n, last_seen - n, True, True
                            )
                        p, alpha, m, l = softmax_step(x, multiplier, m, l)
                        acc = acc * alpha[:, None]
                        if HAS_DROPOUT:
                            keep = keep_mask(
                                key_0,
                                key_1,
                                document_key,
                                tile_head[:, None].to(tl.uint32),
                                first,
                                local_query[:, None],
                                n,
                                local_n[None, :],
                                threshold,
                            )
                            p = tl.where(keep, p, 0.0)
                        v = load_rows(
                            v_tile + tile_v, key, length_k, columns, HEAD_DIM, BLOCK_D, part == 1
                        )
                        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
                        k_tile += BLOCK_N * stride_k
                        v_tile += BLOCK_N * stride_vt
    out, lse = finish(acc, m, l, keep_scale)
    row_o = token * stride_ot + head * stride_oh
    store_rows(
        out_ptr + row_o[:, None] + columns[None, :],
        out,
        query,
        length_q,
        columns,
        HEAD_DIM,
        BLOCK_D,
    )
    row_lse = head * total_q + token
    tl.store(lse_ptr + row_lse, lse, mask=query < length_q)


def dual_chunk_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    q_tiles: Tensor,
    k_tiles: Tensor,
    *,
    inv_freq: Tensor,
    logit_scale: Tensor | None,
    chunk_length: int,
    near: int,
    far_position: int,
    softmax_scale: float,
    dropout_p: float,
    dropout_seed: Tensor | None,
    document_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Launches dual_chunk_fwd_kernel; scratch: keys rotated by -c [Tk, Hk, D].

    Args:
        q: [T, H, D] float16, bfloat16 or float32, last stride 1.
        k: [Tk, Hk, D].
        v: [Tk, Hk, D].
        cu_seqlens_q: [N + 1] int32.
        cu_seqlens_k: [N + 1] int32.
        q_tiles: [n, 2] int32 from a TileSchedule.
        k_tiles: [m, 2] int32, likewise.
        inv_freq: [D/2] float32.
        logit_scale: [N] float32.
        chunk_length: c.
        near: Places of a chunk below it stand at their place + c towards the chunk before.
        far_position: Where the others stand, and all towards earlier chunks.
        softmax_scale: Positive factor of q.k.
        dropout_p: In [0, 1).
        dropout_seed: [1] int64.
        document_ids: [N] int32.

    Returns:
        out [T, H, D] in q's dtype and lse [H, T] float32.
    """
    total_q, heads, head_dim = q.shape
    heads_kv = k.shape[1]
    out = torch.empty((total_q, heads, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, total_q), dtype=torch.float32, device=q.device)
    group = heads // heads_kv
    config = tile_config("dual_chunk_fwd", q, group, dropout_p > 0)
    threshold, scale_kept = dropout_arguments(dropout_p)
    parts = SCHEDULE_ROWS // config.positions * (group // config.pack)
    grid = (heads_kv * q_tiles.shape[0] * parts,)
    if grid[0] == 0:
        return out, lse
    geometry: dict[str, Any] = {
        "inv_freq": inv_freq,
        "chunk_length": chunk_length,
        "near": near,
        "far_position": far_position,
    }
    k_near = rotated_keys(k, cu_seqlens_k, k_tiles, **geometry)
    dual_chunk_rotate(q, out, cu_seqlens_q, cu_seqlens_k, q_tiles, is_query=True, **geometry)
    dual_chunk_fwd_kernel[grid](
        q,
        k,
        k_near,
        v,
        out,
        lse,
        cu_seqlens_q,
        cu_seqlens_k,
        q_tiles,
        logit_scale,
        dropout_seed,
        document_ids,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        k_near.stride(0),
        k_near.stride(1),
        v.stride(0),
        v.stride(1),
        out.stride(0),
        out.stride(1),
        q_tiles.shape[0],
        total_q,
        chunk_length,
        near,
        softmax_scale,
        threshold,
        scale_kept,
        HEAD_DIM=head_dim,
        BLOCK_D=padded_head_dim(head_dim),
        GROUP=group,
        PACK=config.pack,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        HAS_DROPOUT=dropout_p > 0,
        PRECISION=DOT_PRECISION,
        **config.options,
    )
    return out, lse
