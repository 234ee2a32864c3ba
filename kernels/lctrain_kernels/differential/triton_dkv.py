"""The portable backward kernel of differential attention that computes dk1, dk2 and dv."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from lctrain_kernels.tile.arguments import RUNTIME_INTEGERS
from lctrain_kernels.tile.dropout import dropout_head, keep_mask, load_key
from lctrain_kernels.tile.logits import logits_multiplier
from lctrain_kernels.tile.mask import load_window, query_ranges
from lctrain_kernels.tile.memory import load_rows, store_rows
from lctrain_kernels.tile.seqlen import document_bounds, locate_program


class DkvPointers(NamedTuple):
    """Pointers to the tensors that differential_dkv_kernel accesses.

    The kernel's docstring gives the shapes of operands and results. Boundaries, tiles, document_ids
    and query_offsets are those of TiledPack; options are those of AttentionOptions.
    """

    q1: Any
    q2: Any
    k1: Any
    k2: Any
    v: Any
    lam: Any
    dout: Any
    stats: Any
    dk1: Any
    dk2: Any
    dv: Any
    cu_seqlens_q: Any
    cu_seqlens_k: Any
    tiles: Any
    window: Any
    dropout_seed: Any
    document_ids: Any
    query_offsets: Any


class DkvStrides(NamedTuple):
    """Strides of tokens and of heads of each tensor, in elements."""

    q1_token: Any
    q1_head: Any
    q2_token: Any
    q2_head: Any
    k1_token: Any
    k1_head: Any
    k2_token: Any
    k2_head: Any
    v_token: Any
    v_head: Any
    lam_head: Any
    dout_token: Any
    dout_head: Any
    dk_token: Any
    dk_head: Any
    dv_token: Any
    dv_head: Any


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def differential_dkv_kernel(
    pointers: DkvPointers,
    strides: DkvStrides,
    num_tiles,
    total_q,
    window_left,
    window_right,
    scale,
    threshold,
    keep_scale,
    first_head,
    TILE: tl.constexpr,
    FLAGS: tl.constexpr,
    STATS: tl.constexpr,
    SHARED_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Computes dk1, dk2 and dv of BLOCK_N keys of one key/value head, over all its query heads.

    Tiles of scores are transposed, keys by queries, so that the products for dv and dk read the
    weights from registers. dk1 and dk2 [Tk, Hk, D] have the same strides. With SHARED_K, both
    branches read k1, and dk1 alone is written: the sum of both gradients. dv is [Tk, Hk, Dv]. stats
    comes from differential_dq_kernel and has STATS numbers per query: with 8, lam of each query is
    among them; with 4, lam is one number per head, read from the tensor lam.

    Grid: (key/value heads * tiles * SCHEDULE_ROWS / BLOCK_N,).

    tile/arguments.py describes the arguments that are not named here.
    """
    BLOCK_M: tl.constexpr = TILE.block_m
    BLOCK_N: tl.constexpr = TILE.block_n
    BLOCK_D: tl.constexpr = TILE.block_d
    BLOCK_DV: tl.constexpr = TILE.block_dv
    head_kv, _, document, first = locate_program(pointers.tiles, num_tiles, BLOCK_N, 1)
    if document < 0:
        return
    begin_q, length_q = document_bounds(pointers.cu_seqlens_q, document)
    begin_k, length_k = document_bounds(pointers.cu_seqlens_k, document)
    if first >= length_k:
        return
    shift = length_k - length_q
    left, right = load_window(pointers.window, window_left, window_right)
    low, clear_low, clear_high, high = query_ranges(
        first,
        BLOCK_N,
        shift,
        length_q,
        length_k,
        left,
        right,
        FLAGS.has_left,
        FLAGS.has_right,
        BLOCK_M,
    )

    local_m = tl.arange(0, BLOCK_M)
    local_n = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_D)
    value_columns = tl.arange(0, BLOCK_DV)
    key = first + local_n
    token_k = begin_k + key
    own_head = head_kv.to(tl.int64)
    k1 = load_rows(
        pointers.k1
        + own_head * strides.k1_head
        + (token_k * strides.k1_token)[:, None]
        + columns[None, :],
        key,
        length_k,
        columns,
        TILE.head_dim,
        BLOCK_D,
        True,
    )
    k2 = k1
    if not SHARED_K:
        k2 = load_rows(
            pointers.k2
            + own_head * strides.k2_head
            + (token_k * strides.k2_token)[:, None]
            + columns[None, :],
            key,
            length_k,
            columns,
            TILE.head_dim,
            BLOCK_D,
            True,
        )
    v = load_rows(
        pointers.v
        + own_head * strides.v_head
        + (token_k * strides.v_token)[:, None]
        + value_columns[None, :],
        key,
        length_k,
        value_columns,
        TILE.value_dim,
        BLOCK_DV,
        True,
    )
    tile_q1 = local_m[:, None] * strides.q1_token + columns[None, :]
    tile_q2 = local_m[:, None] * strides.q2_token + columns[None, :]
    tile_do = local_m[:, None] * strides.dout_token + value_columns[None, :]
    tile_stats = local_m[:, None] * STATS + tl.arange(0, STATS)[None, :]
    key_0 = 0
    key_1 = 0
    document_key = 0
    query_offset = 0
    if FLAGS.has_dropout:
        key_0, key_1, document_key, query_offset = load_key(
            pointers.dropout_seed, pointers.document_ids, pointers.query_offsets, document
        )
    multiplier = logits_multiplier(scale, False, False)

    dk1 = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if not SHARED_K:
        dk2 = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    # One loop runs over heads and queries, so that the load pipeline never drains between heads.
    blocks = tl.cdiv(high - low, BLOCK_M)
    head = head_kv * TILE.group
    start = low
    token = begin_q + low
    q1_tile = pointers.q1 + token * strides.q1_token + head.to(tl.int64) * strides.q1_head
    q2_tile = pointers.q2 + token * strides.q2_token + head.to(tl.int64) * strides.q2_head
    do_tile = pointers.dout + token * strides.dout_token + head.to(tl.int64) * strides.dout_head
    stats_tile = pointers.stats + (head.to(tl.int64) * total_q + token) * STATS
    lam_head = pointers.lam + head.to(tl.int64) * strides.lam_head
    lam_only = tl.load(lam_head)
    rewind = tl.cast((1 - blocks) * BLOCK_M, tl.int64)
    # The loop has at least one step, which is fully masked if no query sees the keys. If an
    # accumulator could skip the loop, ptxas would serialise the products (C7515).
    steps = tl.maximum(blocks * TILE.group, 1)
    tl.assume(steps > 0)
    for _ in tl.range(0, steps):
        query = start + local_m
        q1 = load_rows(q1_tile + tile_q1, query, length_q, columns, TILE.head_dim, BLOCK_D, True)
        q2 = load_rows(q2_tile + tile_q2, query, length_q, columns, TILE.head_dim, BLOCK_D, True)
        do = load_rows(
            do_tile + tile_do, query, length_q, value_columns, TILE.value_dim, BLOCK_DV, True
        )
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
            lam = lam_only if TILE.group == 1 else tl.load(lam_head)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        x1 = tl.dot(k1, tl.trans(q1), input_precision=PRECISION)
        x2 = tl.dot(k2, tl.trans(q2), input_precision=PRECISION)
        # Masked by comparisons per element, as in varlen_dkv_kernel; bounds per row are slower.
        if (start < clear_low) | (start >= clear_high):
            seen = key[:, None] < length_k
            if FLAGS.has_right:
                seen = seen & (key[:, None] - query[None, :] <= shift + right)
            if FLAGS.has_left:
                seen = seen & (key[:, None] - query[None, :] >= shift - left)
            x1 = tl.where(seen, x1, float("-inf"))
            x2 = tl.where(seen, x2, float("-inf"))
        p1 = tl.exp2(x1 * multiplier - lse1[None, :])
        kept1 = p1
        if FLAGS.has_dropout:
            keep1 = keep_mask(
                key_0,
                key_1,
                document_key,
                (2 * dropout_head(head, first_head)).to(tl.uint32),
                start + query_offset,
                local_m[None, :],
                first,
                local_n[:, None],
                threshold,
            )
            kept1 = tl.where(keep1, p1, 0.0)
        ds1 = kept1 * dp - p1 * e1[None, :] if FLAGS.has_dropout else p1 * (dp - e1[None, :])
        dk1 = tl.dot(ds1.to(q1.dtype), q1, dk1, input_precision=PRECISION)
        p2 = tl.exp2(x2 * multiplier - lse2[None, :])
        kept2 = p2
        if FLAGS.has_dropout:
            keep2 = keep_mask(
                key_0,
                key_1,
                document_key,
                (2 * dropout_head(head, first_head) + 1).to(tl.uint32),
                start + query_offset,
                local_m[None, :],
                first,
                local_n[:, None],
                threshold,
            )
            kept2 = tl.where(keep2, p2, 0.0)
        dv = tl.dot((kept1 - lam * kept2).to(do.dtype), do, dv, input_precision=PRECISION)
        ds2 = (
            p2 * e2[None, :] - kept2 * (lam * dp)
            if FLAGS.has_dropout
            else p2 * (e2[None, :] - lam * dp)
        )
        if SHARED_K:
            dk1 = tl.dot(ds2.to(q2.dtype), q2, dk1, input_precision=PRECISION)
        else:
            dk2 = tl.dot(ds2.to(q2.dtype), q2, dk2, input_precision=PRECISION)
        if TILE.group == 1:
            start += BLOCK_M
            q1_tile += BLOCK_M * strides.q1_token
            q2_tile += BLOCK_M * strides.q2_token
            do_tile += BLOCK_M * strides.dout_token
            stats_tile += BLOCK_M * STATS
        else:
            last = start + BLOCK_M >= high
            start = tl.where(last, low, start + BLOCK_M)
            head = tl.where(last, head + 1, head)
            step = tl.where(last, rewind, BLOCK_M)
            q1_tile += step * strides.q1_token + tl.where(last, strides.q1_head, 0)
            q2_tile += step * strides.q2_token + tl.where(last, strides.q2_head, 0)
            do_tile += step * strides.dout_token + tl.where(last, strides.dout_head, 0)
            stats_tile += (step + tl.where(last, total_q, 0)) * STATS
            lam_head += tl.where(last, strides.lam_head, 0)
    row_dk = (token_k * strides.dk_token + own_head * strides.dk_head)[:, None] + columns[None, :]
    row_dv = (token_k * strides.dv_token + own_head * strides.dv_head)[:, None] + value_columns[
        None, :
    ]
    factor = scale * keep_scale
    store_rows(pointers.dk1 + row_dk, dk1 * factor, key, length_k, columns, TILE.head_dim, BLOCK_D)
    if not SHARED_K:
        store_rows(
            pointers.dk2 + row_dk, dk2 * factor, key, length_k, columns, TILE.head_dim, BLOCK_D
        )
    store_rows(
        pointers.dv + row_dv,
        dv * keep_scale,
        key,
        length_k,
        value_columns,
        TILE.value_dim,
        BLOCK_DV,
    )
