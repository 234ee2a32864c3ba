"""The portable backward kernel of differential attention that computes dq1, dq2 and dlam."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from lctrain_kernels.tile.arguments import RUNTIME_INTEGERS
from lctrain_kernels.tile.dropout import dropout_head, keep_mask, load_key
from lctrain_kernels.tile.logits import LOG2_E, logits_multiplier
from lctrain_kernels.tile.mask import key_ranges, load_window, mask_logits
from lctrain_kernels.tile.memory import load_rows, store_rows
from lctrain_kernels.tile.seqlen import document_bounds, locate_program

_LOG2_E = tl.constexpr(LOG2_E)


class DqPointers(NamedTuple):
    """Pointers to the tensors that differential_dq_kernel accesses.

    The kernel's docstring gives the shapes of operands and results. Boundaries, tiles, document_ids
    and query_offsets are those of TiledPack; options are those of AttentionOptions.
    """

    q1: Any
    q2: Any
    k1: Any
    k2: Any
    v: Any
    lam: Any
    out1: Any
    out2: Any
    dout: Any
    lse1: Any
    lse2: Any
    dlse1: Any
    dlse2: Any
    dq1: Any
    dq2: Any
    dlam: Any
    stats: Any
    cu_seqlens_q: Any
    cu_seqlens_k: Any
    tiles: Any
    window: Any
    dropout_seed: Any
    document_ids: Any
    query_offsets: Any


class DqStrides(NamedTuple):
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
    lam_token: Any
    lam_head: Any
    out_token: Any
    out_head: Any
    dout_token: Any
    dout_head: Any
    dq_token: Any
    dq_head: Any


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def differential_dq_kernel(
    pointers: DqPointers,
    strides: DqStrides,
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
    """Computes dq1, dq2 and dlam of a tile of queries, and statistics for the dk, dv kernel.

    out = A1 v - lam A2 v, where the weights A_b of branch b are the softmax p_b after dropout. With
    dp = dout v^T and D_b = rowsum(dout * A_b v), the gradients of the logits and of lam are

    - ds1 = p1 (dp - e1) with e1 = D1 - dlse1;
    - ds2 = p2 (e2 - lam dp) with e2 = lam D2 + dlse2;
    - dlam = -D2.

    Grid: that of differential_fwd_kernel, whose docstring gives the shapes of the forward's
    tensors.

    - dout [T, H, Dv]; dlse1, dlse2 [H, T] float32 or None.
    - dq1, dq2 [T, H, D] with the same strides; dlam [H, T] float32.
    - stats [H, T, STATS] float32 (written): base-2 lse1 (+inf for a query that saw no key), e1 /
      keep_scale, base-2 lse2, e2 / keep_scale; with STATS = 8 also lam and three unused numbers.
    - With SHARED_K both branches read k1, and pointers.k2 is not read.

    tile/arguments.py describes the arguments that are not named here.
    """
    BLOCK_M: tl.constexpr = TILE.block_m
    BLOCK_N: tl.constexpr = TILE.block_n
    BLOCK_D: tl.constexpr = TILE.block_d
    BLOCK_DV: tl.constexpr = TILE.block_dv
    POSITIONS: tl.constexpr = BLOCK_M // TILE.pack
    head_kv, head_group, document, first = locate_program(
        pointers.tiles, num_tiles, POSITIONS, TILE.group // TILE.pack
    )
    if document < 0:
        return
    begin_q, length_q = document_bounds(pointers.cu_seqlens_q, document)
    begin_k, length_k = document_bounds(pointers.cu_seqlens_k, document)
    if first >= length_q:
        return
    shift = length_k - length_q
    left, right = load_window(pointers.window, window_left, window_right)
    low, clear_low, clear_high, high = key_ranges(
        first,
        POSITIONS,
        shift,
        length_k,
        left,
        right,
        FLAGS.has_left,
        FLAGS.has_right,
        BLOCK_N,
    )

    local_m = tl.arange(0, BLOCK_M)
    local_n = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_D)
    value_columns = tl.arange(0, BLOCK_DV)
    local_query = local_m % POSITIONS
    query = first + local_query
    inside = query < length_q
    tile_head = head_kv * TILE.group + head_group * TILE.pack + local_m // POSITIONS
    head = tl.where(inside, tile_head, 0).to(tl.int64)
    token = begin_q + query
    row_do = token * strides.dout_token + head * strides.dout_head
    do = load_rows(
        pointers.dout + row_do[:, None] + value_columns[None, :],
        query,
        length_q,
        value_columns,
        TILE.value_dim,
        BLOCK_DV,
        True,
    )
    row_o = (token * strides.out_token + head * strides.out_head)[:, None] + value_columns[None, :]
    o1 = load_rows(
        pointers.out1 + row_o, query, length_q, value_columns, TILE.value_dim, BLOCK_DV, True
    )
    o2 = load_rows(
        pointers.out2 + row_o, query, length_q, value_columns, TILE.value_dim, BLOCK_DV, True
    )
    lam = tl.load(
        pointers.lam + token * strides.lam_token + head * strides.lam_head, mask=inside, other=0.0
    )
    row_lse = head * total_q + token
    d2 = tl.sum(o2.to(tl.float32) * do.to(tl.float32), 1)
    e2 = lam * d2
    e1 = tl.sum(o1.to(tl.float32) * do.to(tl.float32), 1)
    if pointers.dlse1 is not None:
        e1 -= tl.load(pointers.dlse1 + row_lse, mask=inside, other=0.0)
    if pointers.dlse2 is not None:
        e2 += tl.load(pointers.dlse2 + row_lse, mask=inside, other=0.0)
    lse1 = tl.load(pointers.lse1 + row_lse, mask=inside, other=float("inf"))
    lse2 = tl.load(pointers.lse2 + row_lse, mask=inside, other=float("inf"))
    # lse = +inf gives a query that saw no key weights of 2^(x - inf) = 0.
    lse1 = tl.where(lse1 == float("-inf"), float("inf"), lse1 * _LOG2_E)
    lse2 = tl.where(lse2 == float("-inf"), float("inf"), lse2 * _LOG2_E)
    # Dropout: ds1 / keep_scale = [kept] p dp - p e1 / keep_scale, ds2 likewise; the factor goes
    # into dq and dk.
    e1 = e1 / keep_scale
    e2 = e2 / keep_scale
    tl.store(pointers.dlam + row_lse, -d2, mask=inside)
    tl.store(pointers.stats + row_lse * STATS, lse1, mask=inside)
    tl.store(pointers.stats + row_lse * STATS + 1, e1, mask=inside)
    tl.store(pointers.stats + row_lse * STATS + 2, lse2, mask=inside)
    tl.store(pointers.stats + row_lse * STATS + 3, e2, mask=inside)
    if STATS == 8:
        tl.store(pointers.stats + row_lse * STATS + 4, lam, mask=inside)

    row_q1 = token * strides.q1_token + head * strides.q1_head
    row_q2 = token * strides.q2_token + head * strides.q2_head
    q1 = load_rows(
        pointers.q1 + row_q1[:, None] + columns[None, :],
        query,
        length_q,
        columns,
        TILE.head_dim,
        BLOCK_D,
        True,
    )
    q2 = load_rows(
        pointers.q2 + row_q2[:, None] + columns[None, :],
        query,
        length_q,
        columns,
        TILE.head_dim,
        BLOCK_D,
        True,
    )
    k1_base = pointers.k1 + begin_k * strides.k1_token + head_kv.to(tl.int64) * strides.k1_head
    v_base = pointers.v + begin_k * strides.v_token + head_kv.to(tl.int64) * strides.v_head
    tile_k1 = local_n[:, None] * strides.k1_token + columns[None, :]
    tile_v = local_n[:, None] * strides.v_token + value_columns[None, :]
    if not SHARED_K:
        k2_base = pointers.k2 + begin_k * strides.k2_token + head_kv.to(tl.int64) * strides.k2_head
        tile_k2 = local_n[:, None] * strides.k2_token + columns[None, :]
    key_0 = 0
    key_1 = 0
    document_key = 0
    query_offset = 0
    if FLAGS.has_dropout:
        key_0, key_1, document_key, query_offset = load_key(
            pointers.dropout_seed, pointers.document_ids, pointers.query_offsets, document
        )
    multiplier = logits_multiplier(scale, False, False)
    first_seen = query + shift - left
    last_seen = tl.minimum(query + shift + right, length_k - 1)

    dq1 = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dq2 = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # Ranges of key tiles: those that the left bound cuts, those without a mask, the diagonal's.
    for part in tl.static_range(0 if FLAGS.has_left else 1, 3):
        begin = low if part == 0 else (clear_low if part == 1 else clear_high)
        end = clear_low if part == 0 else (clear_high if part == 1 else high)
        # As in varlen_dq_kernel: the branch and the pointers keep ptxas from serialising.
        if begin < end:
            k1_tile = k1_base + tl.cast(begin, tl.int64) * strides.k1_token
            v_tile = v_base + tl.cast(begin, tl.int64) * strides.v_token
            if not SHARED_K:
                k2_tile = k2_base + tl.cast(begin, tl.int64) * strides.k2_token
            for n in tl.range(begin, end, BLOCK_N):
                key = n + local_n
                k1 = load_rows(
                    k1_tile + tile_k1,
                    key,
                    length_k,
                    columns,
                    TILE.head_dim,
                    BLOCK_D,
                    part != 1,
                )
                v = load_rows(
                    v_tile + tile_v,
                    key,
                    length_k,
                    value_columns,
                    TILE.value_dim,
                    BLOCK_DV,
                    part != 1,
                )
                k2 = k1
                if not SHARED_K:
                    k2 = load_rows(
                        k2_tile + tile_k2,
                        key,
                        length_k,
                        columns,
                        TILE.head_dim,
                        BLOCK_D,
                        part != 1,
                    )
                dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
                x = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
                if part != 1:
                    x = mask_logits(
                        x, local_n[None, :], first_seen - n, last_seen - n, FLAGS.has_left, True
                    )
                p = tl.exp2(x * multiplier - lse1[:, None])
                if FLAGS.has_dropout:
                    keep = keep_mask(
                        key_0,
                        key_1,
                        document_key,
                        (2 * dropout_head(tile_head, first_head))[:, None].to(tl.uint32),
                        first + query_offset,
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
                        x, local_n[None, :], first_seen - n, last_seen - n, FLAGS.has_left, True
                    )
                p = tl.exp2(x * multiplier - lse2[:, None])
                if FLAGS.has_dropout:
                    keep = keep_mask(
                        key_0,
                        key_1,
                        document_key,
                        (2 * dropout_head(tile_head, first_head) + 1)[:, None].to(tl.uint32),
                        first + query_offset,
                        local_query[:, None],
                        n,
                        local_n[None, :],
                        threshold,
                    )
                    ds = p * e2[:, None] - tl.where(keep, p, 0.0) * (lam[:, None] * dp)
                else:
                    ds = p * (e2[:, None] - lam[:, None] * dp)
                dq2 = tl.dot(ds.to(k1.dtype), k2, dq2, input_precision=PRECISION)
                k1_tile += BLOCK_N * strides.k1_token
                v_tile += BLOCK_N * strides.v_token
                if not SHARED_K:
                    k2_tile += BLOCK_N * strides.k2_token
    row_dq = (token * strides.dq_token + head * strides.dq_head)[:, None] + columns[None, :]
    factor = scale * keep_scale
    store_rows(
        pointers.dq1 + row_dq, dq1 * factor, query, length_q, columns, TILE.head_dim, BLOCK_D
    )
    store_rows(
        pointers.dq2 + row_dq, dq2 * factor, query, length_q, columns, TILE.head_dim, BLOCK_D
    )
