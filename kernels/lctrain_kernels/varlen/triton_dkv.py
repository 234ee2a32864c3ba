"""The backward kernel of varlen attention that owns keys: dk and dv."""

import triton
import triton.language as tl

from lctrain_kernels.tile.arguments import RUNTIME_INTEGERS
from lctrain_kernels.tile.dropout import keep_mask, load_key
from lctrain_kernels.tile.logits import logits, logits_multiplier, softcap_slope
from lctrain_kernels.tile.mask import load_window, query_ranges
from lctrain_kernels.tile.memory import load_rows, store_rows
from lctrain_kernels.tile.seqlen import document_bounds, locate_program


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
