"""Backward of varlen attention in portable Triton: one kernel owns queries (dq), one owns keys (dk,
dv).

Nothing is added across programs, so the result has the same bits in every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lctrain.kernels.attention.config import tile_config
from lctrain.kernels.attention.launch import (
    DOT_PRECISION,
    RUNTIME_INTEGERS,
    alibi_strides,
    dropout_arguments,
    padded_head_dim,
    window_arguments,
)
from lctrain.kernels.schedule import SCHEDULE_ROWS
from lctrain.kernels.tile.dropout import keep_mask, load_key
from lctrain.kernels.tile.logits import LOG2_E, logits, logits_multiplier, softcap_slope
from lctrain.kernels.tile.mask import key_ranges, load_window, mask_logits, query_ranges
from lctrain.kernels.tile.memory import load_rows, store_rows
from lctrain.kernels.tile.seqlen import document_bounds, locate_program

_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def varlen_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    dout_ptr,
    lse_ptr,
    dlse_ptr,
    dq_ptr,
    delta_ptr,
    stats_ptr,
    cu_q_ptr,
    cu_k_ptr,
    tiles_ptr,
    window_ptr,
    alibi_ptr,
    seed_ptr,
    document_ids_ptr,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_ot,
    stride_oh,
    stride_dot,
    stride_doh,
    stride_dqt,
    stride_dqh,
    stride_alibi,
    num_tiles,
    total_q,
    window_left,
    window_right,
    scale,
    softcap,
    threshold,
    keep_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    PACK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq of a tile; also writes what the dk, dv kernel reads per query.

    Grid: as varlen_fwd_kernel. q, out, dout, dq [T, H, D]; k, v [Tk, Hk, D]; lse, dlse and
    delta = rowsum(dout * out) - dlse [H, T] float32. stats [H, T, 4] float32: lse in base 2 (+inf
    where nothing was seen), delta / keep_scale, two unused.
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
    left, right = load_window(window_ptr, window_left, window_right)
    low, clear_low, clear_high, high = key_ranges(
        first, POSITIONS, shift, length_k, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_N
    )

    local_m = tl.arange(0, BLOCK_M)
    local_n = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_D)
    local_query = local_m % POSITIONS
    query = first + local_query
    inside = query < length_q
    tile_head = head_kv * GROUP + head_group * PACK + local_m // POSITIONS
    head = tl.where(inside, tile_head, 0).to(tl.int64)
    token = begin_q + query
    row_do = token * stride_dot + head * stride_doh
    do = load_rows(
        dout_ptr + row_do[:, None] + columns[None, :],
        query,
        length_q,
        columns,
        HEAD_DIM,
        BLOCK_D,
        True,
    )
    row_o = token * stride_ot + head * stride_oh
    o = load_rows(
        out_ptr + row_o[:, None] + columns[None, :],
        query,
        length_q,
        columns,
        HEAD_DIM,
        BLOCK_D,
        True,
    )
    row_lse = head * total_q + token
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + row_lse, mask=inside, other=0.0)
    lse = tl.load(lse_ptr + row_lse, mask=inside, other=float("inf"))
    # A row that saw nothing has no weights: 2^(x - inf) = 0.
    lse2 = tl.where(lse == float("-inf"), float("inf"), lse * _LOG2_E)
    tl.store(stats_ptr + row_lse * 4, lse2, mask=inside)
    tl.store(delta_ptr + row_lse, delta, mask=inside)
    # Dropout: ds / keep_scale = (Z / keep_scale) p dp - p delta / keep_scale; the factor goes into
    # dq and dk.
    delta = delta / keep_scale
    tl.store(stats_ptr + row_lse * 4 + 1, delta, mask=inside)

    row_q = token * stride_qt + head * stride_qh
    q = load_rows(
        q_ptr + row_q[:, None] + columns[None, :], query, length_q, columns, HEAD_DIM, BLOCK_D, True
    )
    k_base = k_ptr + begin_k * stride_kt + head_kv.to(tl.int64) * stride_kh
    v_base = v_ptr + begin_k * stride_vt + head_kv.to(tl.int64) * stride_vh
    tile_k = local_n[:, None] * stride_kt + columns[None, :]
    tile_v = local_n[:, None] * stride_vt + columns[None, :]
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(alibi_ptr + document * stride_alibi + head)[:, None]
    key_0 = 0
    key_1 = 0
    document_key = 0
    if HAS_DROPOUT:
        key_0, key_1, document_key = load_key(seed_ptr, document_ids_ptr, document)
    multiplier = logits_multiplier(scale, HAS_SOFTCAP, HAS_ALIBI)
    first_seen = query + shift - left
    last_seen = tl.minimum(query + shift + right, length_k - 1)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # Ranges: a left bound's tiles, tiles without a mask, the diagonal's.
    for part in tl.static_range(0 if HAS_LEFT else 1, 3):
        begin = low if part == 0 else (clear_low if part == 1 else clear_high)
        end = clear_low if part == 0 else (clear_high if part == 1 else high)
        # The branch keeps the accumulator of an empty range out of the loop's pipeline of products,
        # and pointers advance by addition; without either ptxas may serialise the products (C7515).
        if begin < end:
            k_tile = k_base + tl.cast(begin, tl.int64) * stride_kt
            v_tile = v_base + tl.cast(begin, tl.int64) * stride_vt
            for n in tl.range(begin, end, BLOCK_N):
                key = n + local_n
                k = load_rows(
                    k_tile + tile_k,
                    key,
                    length_k,
                    columns,
                    HEAD_DIM,
                    BLOCK_D,
                    part != 1,
                )
                v = load_rows(
                    v_tile + tile_v,
                    key,
                    length_k,
                    columns,
                    HEAD_DIM,
                    BLOCK_D,
                    part != 1,
                )
                s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
                dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
                x = logits(
                    s,
                    query[:, None],
                    key[None, :],
                    shift,
                    scale,
                    softcap,
                    slope,
                    HAS_SOFTCAP,
                    HAS_ALIBI,
                )
                if part != 1:
                    x = mask_logits(
                        x, local_n[None, :], first_seen - n, last_seen - n, HAS_LEFT, True
                    )
                p = tl.exp2(x * multiplier - lse2[:, None])
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
                    ds = tl.where(keep, p, 0.0) * dp - p * delta[:, None]
                else:
                    ds = p * (dp - delta[:, None])
                if HAS_SOFTCAP:
                    ds = ds * softcap_slope(s, scale, softcap)
                dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
                k_tile += BLOCK_N * stride_kt
                v_tile += BLOCK_N * stride_vt
    row_dq = token * stride_dqt + head * stride_dqh
    store_rows(
        dq_ptr + row_dq[:, None] + columns[None, :],
        dq * (scale * keep_scale),
        query,
        length_q,
        columns,
        HEAD_DIM,
        BLOCK_D,
    )


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def varlen_dkv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    stats_ptr,
    dk_ptr,
    dv_ptr,
    cu_q_ptr,
    cu_k_ptr,
    tiles_ptr,
    window_ptr,
    alibi_ptr,
    seed_ptr,
    document_ids_ptr,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_dot,
    stride_doh,
    stride_dkt,
    stride_dkh,
    stride_alibi,
    num_tiles,
    total_q,
    window_left,
    window_right,
    scale,
    softcap,
    threshold,
    keep_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk and dv of BLOCK_N keys of one key/value head, over all query heads of its group.

    Grid: (key/value heads * tiles * SCHEDULE_ROWS / BLOCK_N,). Tiles are transposed, keys by
    queries, so that the weights reach dv and dk as they lie in registers. dk and dv [Tk, Hk, D] of
    one layout; stats as varlen_dq_kernel writes them.
    """
    head_kv, _, document, first = locate_program(tiles_ptr, num_tiles, BLOCK_N, 1)
    if document < 0:
        return
    begin_q, length_q = document_bounds(cu_q_ptr, document)
    begin_k, length_k = document_bounds(cu_k_ptr, document)
    if first >= length_k:
        return
    shift = length_k - length_q
    left, right = load_window(window_ptr, window_left, window_right)
    low, clear_low, clear_high, high = query_ranges(
        first, BLOCK_N, shift, length_q, length_k, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_M
    )

    local_m = tl.arange(0, BLOCK_M)
    local_n = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_D)
    key = first + local_n
    token_k = begin_k + key
    k = load_rows(
        k_ptr
        + head_kv.to(tl.int64) * stride_kh
        + (token_k * stride_kt)[:, None]
        + columns[None, :],
        key,
        length_k,
        columns,
        HEAD_DIM,
        BLOCK_D,
        True,
    )
    v = load_rows(
        v_ptr
        + head_kv.to(tl.int64) * stride_vh
        + (token_k * stride_vt)[:, None]
        + columns[None, :],
        key,
        length_k,
        columns,
        HEAD_DIM,
        BLOCK_D,
        True,
    )
    tile_q = local_m[:, None] * stride_qt + columns[None, :]
    tile_do = local_m[:, None] * stride_dot + columns[None, :]
    tile_stats = local_m[:, None] * 4 + tl.arange(0, 4)[None, :]
    key_0 = 0
    key_1 = 0
    document_key = 0
    if HAS_DROPOUT:
        key_0, key_1, document_key = load_key(seed_ptr, document_ids_ptr, document)
    multiplier = logits_multiplier(scale, HAS_SOFTCAP, HAS_ALIBI)

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    # One loop over the heads of the group and their queries: its load pipeline never drains.
    blocks = tl.cdiv(high - low, BLOCK_M)
    head = head_kv * GROUP
    start = low
    token = begin_q + low
    q_tile = q_ptr + token * stride_qt + head.to(tl.int64) * stride_qh
    do_tile = dout_ptr + token * stride_dot + head.to(tl.int64) * stride_doh
    stats_tile = stats_ptr + (head.to(tl.int64) * total_q + token) * 4
    rewind = tl.cast((1 - blocks) * BLOCK_M, tl.int64)
    # At least one step, on a tile that is all masked where nothing is visible: an accumulator that
    # skips the loop makes ptxas serialise the products (C7515).
    steps = tl.maximum(blocks * GROUP, 1)
    tl.assume(steps > 0)
    for _ in tl.range(0, steps):
        query = start + local_m
        q = load_rows(q_tile + tile_q, query, length_q, columns, HEAD_DIM, BLOCK_D, True)
        # Four numbers per query make the tile large enough to be fetched once, not once per
        # thread.
        stats = tl.load(stats_tile + tile_stats, mask=(query < length_q)[:, None], other=0.0)
        even, odd = tl.split(tl.reshape(stats, [BLOCK_M, 2, 2]))
        lse2, _ = tl.split(even)
        delta, _ = tl.split(odd)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        slope = 0.0
        if HAS_ALIBI:
            slope = tl.load(alibi_ptr + document * stride_alibi + head)
        x = logits(
            s,
            query[None, :],
            key[:, None],
            shift,
            scale,
            softcap,
            slope,
            HAS_SOFTCAP,
            HAS_ALIBI,
        )
        # LLVM turns this branch into selects, which take more instructions than masking every tile
        # and are still the faster kernel (bench/NOTES.md).
        if (start < clear_low) | (start >= clear_high):
            seen = key[:, None] < length_k
            if HAS_RIGHT:
                seen = seen & (key[:, None] - query[None, :] <= shift + right)
            if HAS_LEFT:
                seen = seen & (key[:, None] - query[None, :] >= shift - left)
            x = tl.where(seen, x, float("-inf"))
        if HAS_ALIBI:
            # A negative slope would grow without bound on queries beyond the document.
            x = tl.where((query < length_q)[None, :], x, float("-inf"))
        p = tl.exp2(x * multiplier - lse2[None, :])
        do = load_rows(do_tile + tile_do, query, length_q, columns, HEAD_DIM, BLOCK_D, True)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        dropped = p
        if HAS_DROPOUT:
            keep = keep_mask(
                key_0,
                key_1,
                document_key,
                head.to(tl.uint32),
                start,
                local_m[None, :],
                first,
                local_n[:, None],
                threshold,
            )
            dropped = tl.where(keep, p, 0.0)
        dv = tl.dot(dropped.to(do.dtype), do, dv, input_precision=PRECISION)
        ds = dropped * dp - p * delta[None, :] if HAS_DROPOUT else p * (dp - delta[None, :])
        if HAS_SOFTCAP:
            ds = ds * softcap_slope(s, scale, softcap)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
        last = start + BLOCK_M >= high
        start = tl.where(last, low, start + BLOCK_M)
        head = tl.where(last, head + 1, head)
        step = tl.where(last, rewind, BLOCK_M)
        q_tile += step * stride_qt + tl.where(last, stride_qh, 0)
        do_tile += step * stride_dot + tl.where(last, stride_doh, 0)
        stats_tile += (step + tl.where(last, total_q, 0)) * 4
    row_dk = (token_k * stride_dkt + head_kv.to(tl.int64) * stride_dkh)[:, None] + columns[None, :]
    store_rows(
        dk_ptr + row_dk, dk * (scale * keep_scale), key, length_k, columns, HEAD_DIM, BLOCK_D
    )
    store_rows(dv_ptr + row_dk, dv * keep_scale, key, length_k, columns, HEAD_DIM, BLOCK_D)


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
    block_d = padded_head_dim(head_dim)
    flags = {
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "GROUP": group,
        "HAS_LEFT": has_left,
        "HAS_RIGHT": has_right,
        "HAS_SOFTCAP": softcap > 0,
        "HAS_ALIBI": alibi_slopes is not None,
        "HAS_DROPOUT": dropout_p > 0,
        "PRECISION": DOT_PRECISION,
    }
    config = tile_config("varlen_dq", q, group, dropout_p > 0)
    parts = SCHEDULE_ROWS // config.positions * (group // config.pack)
    grid = (heads_kv * q_tiles.shape[0] * parts,)
    if grid[0] > 0:
        varlen_dq_kernel[grid](
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
            q.stride(0),
            q.stride(1),
            k.stride(0),
            k.stride(1),
            v.stride(0),
            v.stride(1),
            out.stride(0),
            out.stride(1),
            dout.stride(0),
            dout.stride(1),
            dq.stride(0),
            dq.stride(1),
            alibi_strides(alibi_slopes),
            q_tiles.shape[0],
            total_q,
            left,
            right,
            softmax_scale,
            softcap,
            threshold,
            scale_kept,
            PACK=config.pack,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            **config.options,
            **flags,
        )
    config = tile_config("varlen_dkv", q, group, dropout_p > 0)
    grid = (heads_kv * k_tiles.shape[0] * (SCHEDULE_ROWS // config.block_n),)
    if grid[0] > 0:
        varlen_dkv_kernel[grid](
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
            q.stride(0),
            q.stride(1),
            k.stride(0),
            k.stride(1),
            v.stride(0),
            v.stride(1),
            dout.stride(0),
            dout.stride(1),
            dk.stride(0),
            dk.stride(1),
            alibi_strides(alibi_slopes),
            k_tiles.shape[0],
            total_q,
            left,
            right,
            softmax_scale,
            softcap,
            threshold,
            scale_kept,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            **config.options,
            **flags,
        )
    return dq, dk, dv, delta
