"""The backward kernel of differential attention that owns queries: dq1, dq2 and dlam."""

import triton
import triton.language as tl

from lctrain_kernels.tile.arguments import RUNTIME_INTEGERS
from lctrain_kernels.tile.dropout import keep_mask, load_key
from lctrain_kernels.tile.logits import LOG2_E, logits_multiplier
from lctrain_kernels.tile.mask import key_ranges, load_window, mask_logits
from lctrain_kernels.tile.memory import load_rows, store_rows
from lctrain_kernels.tile.seqlen import document_bounds, locate_program

_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def differential_dq_kernel(
    q1_ptr,
    q2_ptr,
    k1_ptr,
    k2_ptr,
    v_ptr,
    lam_ptr,
    out1_ptr,
    out2_ptr,
    dout_ptr,
    lse1_ptr,
    lse2_ptr,
    dlse1_ptr,
    dlse2_ptr,
    dq1_ptr,
    dq2_ptr,
    dlam_ptr,
    stats_ptr,
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
    stride_lt,
    stride_lh,
    stride_ot,
    stride_oh,
    stride_dot,
    stride_doh,
    stride_dqt,
    stride_dqh,
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
    PACK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STATS: tl.constexpr,
    SHARED_K: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq1 and dq2 of a tile; also writes dlam and what the dk, dv kernel reads per query.

    With D_b = rowsum(dout * A_b v): ds1 = p1 (dp - e1) with e1 = D1 - dlse1, and
    ds2 = p2 (e2 - lam dp) with e2 = lam D2 + dlse2; dlam = -D2.

    Grid: as differential_fwd_kernel, whose tensors have the shapes given there. dout [T, H, Dv];
    dlse1, dlse2 [H, T] float32 or None; dq1, dq2 [T, H, D] of one layout; dlam [H, T] float32.
    stats [H, T, STATS] float32: lse1 in base 2 (+inf where nothing was seen), e1 / keep_scale,
    lse2, e2 / keep_scale; with STATS = 8 also lam, and three unused.
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
    value_columns = tl.arange(0, BLOCK_DV)
    local_query = local_m % POSITIONS
    query = first + local_query
    inside = query < length_q
    tile_head = head_kv * GROUP + head_group * PACK + local_m // POSITIONS
    head = tl.where(inside, tile_head, 0).to(tl.int64)
    token = begin_q + query
    row_do = token * stride_dot + head * stride_doh
    do = load_rows(
        dout_ptr + row_do[:, None] + value_columns[None, :],
        query,
        length_q,
        value_columns,
        VALUE_DIM,
        BLOCK_DV,
        True,
    )
    row_o = (token * stride_ot + head * stride_oh)[:, None] + value_columns[None, :]
    o1 = load_rows(out1_ptr + row_o, query, length_q, value_columns, VALUE_DIM, BLOCK_DV, True)
    o2 = load_rows(out2_ptr + row_o, query, length_q, value_columns, VALUE_DIM, BLOCK_DV, True)
    lam = tl.load(lam_ptr + token * stride_lt + head * stride_lh, mask=inside, other=0.0)
    row_lse = head * total_q + token
    d2 = tl.sum(o2.to(tl.float32) * do.to(tl.float32), 1)
    e2 = lam * d2
    e1 = tl.sum(o1.to(tl.float32) * do.to(tl.float32), 1)
    if dlse1_ptr is not None:
        e1 -= tl.load(dlse1_ptr + row_lse, mask=inside, other=0.0)
    if dlse2_ptr is not None:
        e2 += tl.load(dlse2_ptr + row_lse, mask=inside, other=0.0)
    lse1 = tl.load(lse1_ptr + row_lse, mask=inside, other=float("inf"))
    lse2 = tl.load(lse2_ptr + row_lse, mask=inside, other=float("inf"))
    # A row that saw nothing has no weights: 2^(x - inf) = 0.
    lse1 = tl.where(lse1 == float("-inf"), float("inf"), lse1 * _LOG2_E)
    lse2 = tl.where(lse2 == float("-inf"), float("inf"), lse2 * _LOG2_E)
    # Dropout: ds1 / keep_scale = [kept] p dp - p e1 / keep_scale, ds2 likewise; the factor goes
    # into dq and dk.
    e1 = e1 / keep_scale
    e2 = e2 / keep_scale
    tl.store(dlam_ptr + row_lse, -d2, mask=inside)
    tl.store(stats_ptr + row_lse * STATS, lse1, mask=inside)
    tl.store(stats_ptr + row_lse * STATS + 1, e1, mask=inside)
    tl.store(stats_ptr + row_lse * STATS + 2, lse2, mask=inside)
    tl.store(stats_ptr + row_lse * STATS + 3, e2, mask=inside)
    if STATS == 8:
        tl.store(stats_ptr + row_lse * STATS + 4, lam, mask=inside)

    row_q1 = token * stride_q1t + head * stride_q1h
    row_q2 = token * stride_q2t + head * stride_q2h
    q1 = load_rows(
        q1_ptr + row_q1[:, None] + columns[None, :],
        query,
        length_q,
        columns,
        HEAD_DIM,
        BLOCK_D,
        True,
    )
    q2 = load_rows(
        q2_ptr + row_q2[:, None] + columns[None, :],
        query,
        length_q,
        columns,
        HEAD_DIM,
        BLOCK_D,
        True,
    )
    k1_base = k1_ptr + begin_k * stride_k1t + head_kv.to(tl.int64) * stride_k1h
    v_base = v_ptr + begin_k * stride_vt + head_kv.to(tl.int64) * stride_vh
    tile_k1 = local_n[:, None] * stride_k1t + columns[None, :]
    tile_v = local_n[:, None] * stride_vt + value_columns[None, :]
    if not SHARED_K:
        k2_base = k2_ptr + begin_k * stride_k2t + head_kv.to(tl.int64) * stride_k2h
        tile_k2 = local_n[:, None] * stride_k2t + columns[None, :]
    key_0 = 0
    key_1 = 0
    document_key = 0
    if HAS_DROPOUT:
        key_0, key_1, document_key = load_key(seed_ptr, document_ids_ptr, document)
    multiplier = logits_multiplier(scale, False, False)
    first_seen = query + shift - left
    last_seen = tl.minimum(query + shift + right, length_k - 1)

    dq1 = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dq2 = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # Ranges: a left bound's tiles, tiles without a mask, the diagonal's.
    for part in tl.static_range(0 if HAS_LEFT else 1, 3):
        begin = low if part == 0 else (clear_low if part == 1 else clear_high)
        end = clear_low if part == 0 else (clear_high if part == 1 else high)
        # As in varlen_dq_kernel: the branch and the pointers keep ptxas from serialising.
        if begin < end:
            k1_tile = k1_base + tl.cast(begin, tl.int64) * stride_k1t
            v_tile = v_base + tl.cast(begin, tl.int64) * stride_vt
            if not SHARED_K:
                k2_tile = k2_base + tl.cast(begin, tl.int64) * stride_k2t
            for n in tl.range(begin, end, BLOCK_N):
                key = n + local_n
                k1 = load_rows(
                    k1_tile + tile_k1, key, length_k, columns, HEAD_DIM, BLOCK_D, part != 1
                )
                v = load_rows(
                    v_tile + tile_v, key, length_k, value_columns, VALUE_DIM, BLOCK_DV, part != 1
                )
                k2 = k1
                if not SHARED_K:
                    k2 = load_rows(
                        k2_tile + tile_k2, key, length_k, columns, HEAD_DIM, BLOCK_D, part != 1
                    )
                dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
                x = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
                if part != 1:
                    x = mask_logits(
                        x, local_n[None, :], first_seen - n, last_seen - n, HAS_LEFT, True
                    )
                p = tl.exp2(x * multiplier - lse1[:, None])
                if HAS_DROPOUT:
                    keep = keep_mask(
                        key_0,
                        key_1,
                        document_key,
                        (2 * tile_head)[:, None].to(tl.uint32),
                        first,
                        local_query[:, None],
                        n,
                        local_n[None, :],
                        threshold,
                    )
                    ds = tl.where(keep, p, 0.0) * dp - p * e1[:, None]
                else:
                    ds = p * (dp - e1[:, None])
                dq1 = tl.dot(ds.to(k1.dtype), k1, dq1, input_precision=PRECISION)
                x = tl.dot(q2, tl.trans(k2), input_precision=PRECISION)
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
                        (2 * tile_head + 1)[:, None].to(tl.uint32),
                        first,
                        local_query[:, None],
                        n,
                        local_n[None, :],
                        threshold,
                    )
                    ds = p * e2[:, None] - tl.where(keep, p, 0.0) * (lam[:, None] * dp)
                else:
                    ds = p * (e2[:, None] - lam[:, None] * dp)
                dq2 = tl.dot(ds.to(k1.dtype), k2, dq2, input_precision=PRECISION)
                k1_tile += BLOCK_N * stride_k1t
                v_tile += BLOCK_N * stride_vt
                if not SHARED_K:
                    k2_tile += BLOCK_N * stride_k2t
    row_dq = (token * stride_dqt + head * stride_dqh)[:, None] + columns[None, :]
    factor = scale * keep_scale
    store_rows(dq1_ptr + row_dq, dq1 * factor, query, length_q, columns, HEAD_DIM, BLOCK_D)
    store_rows(dq2_ptr + row_dq, dq2 * factor, query, length_q, columns, HEAD_DIM, BLOCK_D)
