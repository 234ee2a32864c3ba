"""The backward kernel of varlen attention that owns queries: dq."""

import triton
import triton.language as tl

from lctrain_kernels.tile.arguments import RUNTIME_INTEGERS
from lctrain_kernels.tile.dropout import keep_mask, load_key
from lctrain_kernels.tile.logits import LOG2_E, logits, logits_multiplier, softcap_slope
from lctrain_kernels.tile.mask import key_ranges, load_window, mask_logits
from lctrain_kernels.tile.memory import load_rows, store_rows
from lctrain_kernels.tile.seqlen import document_bounds, locate_program

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
