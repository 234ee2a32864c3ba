"""The backward kernel of differential attention that owns keys: dk1, dk2 and dv."""

import triton
import triton.language as tl

from lctrain_kernels.tile.arguments import RUNTIME_INTEGERS
from lctrain_kernels.tile.dropout import keep_mask, load_key
from lctrain_kernels.tile.logits import logits_multiplier
from lctrain_kernels.tile.mask import load_window, query_ranges
from lctrain_kernels.tile.memory import load_rows, store_rows
from lctrain_kernels.tile.seqlen import document_bounds, locate_program


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def differential_dkv_kernel(
    q1_ptr,
    q2_ptr,
    k1_ptr,
    k2_ptr,
    v_ptr,
    lam_ptr,
    dout_ptr,
    stats_ptr,
    dk1_ptr,
    dk2_ptr,
    dv_ptr,
    cu_q_ptr,
    cu_k_ptr,
    tiles_ptr,
    window_ptr,
    seed_ptr,
    document_ids_ptr,
    stride_q1t,
    stride_q1h,
    stride_q2t,
    stride_q2h,
    stride_k1t,
    stride_k1h,
    stride_k2t,
    stride_k2h,
    stride_vt,
    stride_vh,
    stride_lh,
    stride_dot,
    stride_doh,
    stride_dkt,
    stride_dkh,
    stride_dvt,
    stride_dvh,
    num_tiles,
    total_q,
    window_left,
    window_right,
    scale,
    threshold,
    keep_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STATS: tl.constexpr,
    SHARED_K: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk1, dk2 and dv of BLOCK_N keys of one key/value head, over all heads of its group.

    Grid: (key/value heads * tiles * SCHEDULE_ROWS / BLOCK_N,). Tiles are transposed, keys by
    queries, so that the weights reach dv and dk as they lie in registers. dk1 and dk2 [Tk, Hk, D]
    of one layout, only dk1 (the sum) with SHARED_K; dv [Tk, Hk, Dv]. stats as
    differential_dq_kernel writes them; with STATS = 4 lam is one number per head.
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
    value_columns = tl.arange(0, BLOCK_DV)
    key = first + local_n
    token_k = begin_k + key
    own_head = head_kv.to(tl.int64)
    k1 = load_rows(
        k1_ptr + own_head * stride_k1h + (token_k * stride_k1t)[:, None] + columns[None, :],
        key,
        length_k,
        columns,
        HEAD_DIM,
        BLOCK_D,
        True,
    )
    k2 = k1
    if not SHARED_K:
        k2 = load_rows(
            k2_ptr + own_head * stride_k2h + (token_k * stride_k2t)[:, None] + columns[None, :],
            key,
            length_k,
            columns,
            HEAD_DIM,
            BLOCK_D,
            True,
        )
    v = load_rows(
        v_ptr + own_head * stride_vh + (token_k * stride_vt)[:, None] + value_columns[None, :],
        key,
        length_k,
        value_columns,
        VALUE_DIM,
        BLOCK_DV,
        True,
    )
    tile_q1 = local_m[:, None] * stride_q1t + columns[None, :]
    tile_q2 = local_m[:, None] * stride_q2t + columns[None, :]
    tile_do = local_m[:, None] * stride_dot + value_columns[None, :]
    tile_stats = local_m[:, None] * STATS + tl.arange(0, STATS)[None, :]
    key_0 = 0
    key_1 = 0
    document_key = 0
    if HAS_DROPOUT:
        key_0, key_1, document_key = load_key(seed_ptr, document_ids_ptr, document)
    multiplier = logits_multiplier(scale, False, False)

    dk1 = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if not SHARED_K:
        dk2 = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    # One loop over the heads of the group and their queries: its load pipeline never drains.
    blocks = tl.cdiv(high - low, BLOCK_M)
    head = head_kv * GROUP
    start = low
    token = begin_q + low
    q1_tile = q1_ptr + token * stride_q1t + head.to(tl.int64) * stride_q1h
    q2_tile = q2_ptr + token * stride_q2t + head.to(tl.int64) * stride_q2h
    do_tile = dout_ptr + token * stride_dot + head.to(tl.int64) * stride_doh
    stats_tile = stats_ptr + (head.to(tl.int64) * total_q + token) * STATS
    lam_head = lam_ptr + head.to(tl.int64) * stride_lh
    lam_only = tl.load(lam_head)
    rewind = tl.cast((1 - blocks) * BLOCK_M, tl.int64)
    # At least one step, on a tile that is all masked where nothing is visible: an accumulator that
    # skips the loop makes ptxas serialise the products (C7515).
    steps = tl.maximum(blocks * GROUP, 1)
    tl.assume(steps > 0)
    for _ in tl.range(0, steps):
        query = start + local_m
        q1 = load_rows(q1_tile + tile_q1, query, length_q, columns, HEAD_DIM, BLOCK_D, True)
        q2 = load_rows(q2_tile + tile_q2, query, length_q, columns, HEAD_DIM, BLOCK_D, True)
        do = load_rows(do_tile + tile_do, query, length_q, value_columns, VALUE_DIM, BLOCK_DV, True)
        # All numbers of a query in one tile, which is fetched once, not once per thread.
        stats = tl.load(stats_tile + tile_stats, mask=(query < length_q)[:, None], other=0.0)
        if STATS == 8:
            even, odd = tl.split(tl.reshape(stats, [BLOCK_M, 2, 2, 2]))
            even, lse2_tail = tl.split(even)
            odd, e2_tail = tl.split(odd)
            lse1, lam_row = tl.split(even)
            e1, _ = tl.split(odd)
            lse2, _ = tl.split(lse2_tail)
            e2, _ = tl.split(e2_tail)
            lam = lam_row[None, :]
        else:
            even, odd = tl.split(tl.reshape(stats, [BLOCK_M, 2, 2]))
            lse1, lse2 = tl.split(even)
            e1, e2 = tl.split(odd)
            lam = lam_only if GROUP == 1 else tl.load(lam_head)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        x1 = tl.dot(k1, tl.trans(q1), input_precision=PRECISION)
        x2 = tl.dot(k2, tl.trans(q2), input_precision=PRECISION)
        # As in varlen_dkv_kernel, where a mask by bounds per row was the slower kernel.
        if (start < clear_low) | (start >= clear_high):
            seen = key[:, None] < length_k
            if HAS_RIGHT:
                seen = seen & (key[:, None] - query[None, :] <= shift + right)
            if HAS_LEFT:
                seen = seen & (key[:, None] - query[None, :] >= shift - left)
            x1 = tl.where(seen, x1, float("-inf"))
            x2 = tl.where(seen, x2, float("-inf"))
        p1 = tl.exp2(x1 * multiplier - lse1[None, :])
        kept1 = p1
        if HAS_DROPOUT:
            keep1 = keep_mask(
                key_0,
                key_1,
                document_key,
                (2 * head).to(tl.uint32),
                start,
                local_m[None, :],
                first,
                local_n[:, None],
                threshold,
            )
            kept1 = tl.where(keep1, p1, 0.0)
        ds1 = kept1 * dp - p1 * e1[None, :] if HAS_DROPOUT else p1 * (dp - e1[None, :])
        dk1 = tl.dot(ds1.to(q1.dtype), q1, dk1, input_precision=PRECISION)
        p2 = tl.exp2(x2 * multiplier - lse2[None, :])
        kept2 = p2
        if HAS_DROPOUT:
            keep2 = keep_mask(
                key_0,
                key_1,
                document_key,
                (2 * head + 1).to(tl.uint32),
                start,
                local_m[None, :],
                first,
                local_n[:, None],
                threshold,
            )
            kept2 = tl.where(keep2, p2, 0.0)
        dv = tl.dot((kept1 - lam * kept2).to(do.dtype), do, dv, input_precision=PRECISION)
        ds2 = (
            p2 * e2[None, :] - kept2 * (lam * dp) if HAS_DROPOUT else p2 * (e2[None, :] - lam * dp)
        )
        if SHARED_K:
            dk1 = tl.dot(ds2.to(q2.dtype), q2, dk1, input_precision=PRECISION)
        else:
            dk2 = tl.dot(ds2.to(q2.dtype), q2, dk2, input_precision=PRECISION)
        if GROUP == 1:
            start += BLOCK_M
            q1_tile += BLOCK_M * stride_q1t
            q2_tile += BLOCK_M * stride_q2t
            do_tile += BLOCK_M * stride_dot
            stats_tile += BLOCK_M * STATS
        else:
            last = start + BLOCK_M >= high
            start = tl.where(last, low, start + BLOCK_M)
            head = tl.where(last, head + 1, head)
            step = tl.where(last, rewind, BLOCK_M)
            q1_tile += step * stride_q1t + tl.where(last, stride_q1h, 0)
            q2_tile += step * stride_q2t + tl.where(last, stride_q2h, 0)
            do_tile += step * stride_dot + tl.where(last, stride_doh, 0)
            stats_tile += (step + tl.where(last, total_q, 0)) * STATS
            lam_head += tl.where(last, stride_lh, 0)
    row_dk = (token_k * stride_dkt + own_head * stride_dkh)[:, None] + columns[None, :]
    row_dv = (token_k * stride_dvt + own_head * stride_dvh)[:, None] + value_columns[None, :]
    factor = scale * keep_scale
    store_rows(dk1_ptr + row_dk, dk1 * factor, key, length_k, columns, HEAD_DIM, BLOCK_D)
    if not SHARED_K:
        store_rows(dk2_ptr + row_dk, dk2 * factor, key, length_k, columns, HEAD_DIM, BLOCK_D)
    store_rows(dv_ptr + row_dv, dv * keep_scale, key, length_k, value_columns, VALUE_DIM, BLOCK_DV)
