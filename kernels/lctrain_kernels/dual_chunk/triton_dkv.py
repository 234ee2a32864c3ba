"""The portable backward kernel of dual chunk attention that computes dk and dv."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from lctrain_kernels.dual_chunk.ranges import (
    INTER,
    INTRA,
    SUCC,
    chunk_begin,
    queries_of_key,
    queries_of_tile,
)
from lctrain_kernels.tile.arguments import RUNTIME_INTEGERS
from lctrain_kernels.tile.dropout import dropout_head, keep_mask, load_key
from lctrain_kernels.tile.logits import LOG2_E
from lctrain_kernels.tile.mask import mask_logits
from lctrain_kernels.tile.memory import load_rows, store_rows
from lctrain_kernels.tile.rotary import (
    cos_sin,
    load_frequencies,
    load_pairs,
    pair_columns,
    rotate,
    store_pairs,
)
from lctrain_kernels.tile.seqlen import document_bounds, locate_program

_LOG2_E = tl.constexpr(LOG2_E)


class DkvPointers(NamedTuple):
    """Pointers to the tensors that dual_chunk_dkv_kernel accesses.

    The kernel's docstring gives the shapes of operands and results. Boundaries, tiles, document_ids
    and query_offsets are those of TiledPack; options are those of AttentionOptions.
    """

    q: Any
    q_inter: Any
    k: Any
    k_succ: Any
    v: Any
    dout: Any
    stats: Any
    dk: Any
    dv: Any
    cu_seqlens_q: Any
    cu_seqlens_k: Any
    tiles: Any
    inv_freq: Any
    logit_scale: Any
    dropout_seed: Any
    document_ids: Any
    query_offsets: Any


class DkvStrides(NamedTuple):
    """Strides of tokens and of heads of each tensor, in elements."""

    q_token: Any
    q_head: Any
    q_inter_token: Any
    q_inter_head: Any
    k_token: Any
    k_head: Any
    k_succ_token: Any
    k_succ_head: Any
    v_token: Any
    v_head: Any
    dout_token: Any
    dout_head: Any
    dk_token: Any
    dk_head: Any


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def dual_chunk_dkv_kernel(
    pointers: DkvPointers,
    strides: DkvStrides,
    num_tiles,
    total_q,
    chunk_length,
    succ_length,
    scale,
    threshold,
    keep_scale,
    first_head,
    TILE: tl.constexpr,
    FLAGS: tl.constexpr,
    IS_SUCC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Computes dk and dv of BLOCK_N keys of one key/value head, over all query heads of its group.

    There are two launches over the ranges of ranges.py, with c tokens per chunk:

    - With IS_SUCC, keys rotated by -c are multiplied by their SUCC queries; dk is then rotated by
      c.
    - Without IS_SUCC, unrotated keys are multiplied by unrotated queries (INTRA) and by queries at
      the inter position (INTER). At launch, dk and dv hold the results of SUCC, which are added.

    Tiles of scores are transposed, keys by queries, so that the products for dv and dk read the
    weights from registers. q_inter [T, H, D] (queries at the inter position), k_succ [Tk, Hk, D]
    (keys rotated by -c) and stats [H, T, 4] come from dual_chunk_rotate. dk and dv [Tk, Hk, D] have
    the same strides.

    Grid: (key/value heads * tiles * SCHEDULE_ROWS / BLOCK_N,).

    chunk_length is c, and succ_length the number of SUCC queries at the start of a chunk.
    tile/arguments.py describes the arguments that are not named here.
    """
    BLOCK_M: tl.constexpr = TILE.block_m
    BLOCK_N: tl.constexpr = TILE.block_n
    BLOCK_D: tl.constexpr = TILE.block_d
    head_kv, _, document, first = locate_program(pointers.tiles, num_tiles, BLOCK_N, 1)
    if document < 0:
        return
    begin_q, length_q = document_bounds(pointers.cu_seqlens_q, document)
    begin_k, length_k = document_bounds(pointers.cu_seqlens_k, document)
    if first >= length_k:
        return
    shift = length_k - length_q
    last = tl.minimum(first + BLOCK_N, length_k) - 1
    # Keys of a document's last chunk have no SUCC queries.
    succ_end = tl.where(succ_length > 0, chunk_begin(length_k - 1, chunk_length), 0)
    if IS_SUCC and first >= succ_end:
        return

    local_m = tl.arange(0, BLOCK_M)
    local_n = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_D)
    pairs = pair_columns(TILE.head_dim, BLOCK_D)
    key = first + local_n
    token_k = begin_k + key
    if IS_SUCC:
        k_rows = (
            pointers.k_succ
            + (token_k * strides.k_succ_token + head_kv.to(tl.int64) * strides.k_succ_head)[:, None]
        )
    else:
        k_rows = (
            pointers.k
            + (token_k * strides.k_token + head_kv.to(tl.int64) * strides.k_head)[:, None]
        )
    k = load_pairs(k_rows + pairs[None, :], key, length_k, TILE.head_dim, BLOCK_D, True)
    row_v = (token_k * strides.v_token + head_kv.to(tl.int64) * strides.v_head)[:, None]
    v = load_rows(
        pointers.v + row_v + columns[None, :],
        key,
        length_k,
        columns,
        TILE.head_dim,
        BLOCK_D,
        True,
    )
    tile_do = local_m[:, None] * strides.dout_token + columns[None, :]
    tile_stats = local_m[:, None] * 4 + tl.arange(0, 4)[None, :]
    key_0 = 0
    key_1 = 0
    document_key = 0
    query_offset = 0
    if FLAGS.has_dropout:
        key_0, key_1, document_key, query_offset = load_key(
            pointers.dropout_seed, pointers.document_ids, pointers.query_offsets, document
        )
    multiplier = scale * _LOG2_E
    dk_scale = scale * keep_scale
    if pointers.logit_scale is not None:
        factor = tl.load(pointers.logit_scale + document)
        multiplier *= factor
        dk_scale *= factor

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for step in tl.range(0, 1 if IS_SUCC else 2):
        relation = SUCC if IS_SUCC else INTRA - step * (INTRA - INTER)
        low, clear_low, clear_high, high = queries_of_tile(
            first, last, relation, chunk_length, succ_length, length_k
        )
        low = tl.maximum(low - shift, 0)
        high = tl.minimum(high - shift, length_q)
        if low < high:
            first_seen, last_seen = queries_of_key(
                key, relation, chunk_length, succ_length, length_k
            )
            # Ranges of query positions; no query sees keys beyond the document.
            first_seen -= shift
            last_seen = tl.where(key < length_k, last_seen - shift, -1)
            clear_low = tl.where(first + BLOCK_N > length_k, high, clear_low - shift)
            clear_high -= shift
            stride_t = tl.where(relation == INTER, strides.q_inter_token, strides.q_token)
            stride_h = tl.where(relation == INTER, strides.q_inter_head, strides.q_head)
            # One loop over the heads of the group and their queries: its load pipeline never
            # drains.
            begin = low // 16 * 16  # where a draw of the dropout mask begins
            blocks = tl.cdiv(high - begin, BLOCK_M)
            head = head_kv * TILE.group
            start = begin
            token = begin_q + begin
            q_tile = tl.where(relation == INTER, pointers.q_inter, pointers.q) + token * stride_t
            q_tile += head.to(tl.int64) * stride_h
            tile_q = local_m[:, None] * stride_t + pairs[None, :]
            do_tile = (
                pointers.dout + token * strides.dout_token + head.to(tl.int64) * strides.dout_head
            )
            stats_tile = pointers.stats + (head.to(tl.int64) * total_q + token) * 4
            rewind = tl.cast((1 - blocks) * BLOCK_M, tl.int64)
            for _ in tl.range(0, TILE.group * blocks):
                query = start + local_m
                q = load_pairs(q_tile + tile_q, query, length_q, TILE.head_dim, BLOCK_D, True)
                # As one small tile: as two vectors every thread would fetch its copies itself.
                stats = tl.load(
                    stats_tile + tile_stats, mask=(query < length_q)[:, None], other=0.0
                )
                even, odd = tl.split(tl.reshape(stats, [BLOCK_M, 2, 2]))
                lse2, _ = tl.split(even)
                delta, _ = tl.split(odd)
                x = tl.dot(k, tl.trans(q), input_precision=PRECISION)
                if (start < clear_low) | (start + BLOCK_M > clear_high):
                    x = mask_logits(
                        x, local_m[None, :], first_seen - start, last_seen - start, True, True
                    )
                p = tl.exp2(x * multiplier - lse2[None, :])
                do = load_rows(
                    do_tile + tile_do, query, length_q, columns, TILE.head_dim, BLOCK_D, True
                )
                dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
                dropped = p
                if FLAGS.has_dropout:
                    keep = keep_mask(
                        key_0,
                        key_1,
                        document_key,
                        dropout_head(head, first_head).to(tl.uint32),
                        start + query_offset,
                        local_m[None, :],
                        first,
                        local_n[:, None],
                        threshold,
                    )
                    dropped = tl.where(keep, p, 0.0)
                dv = tl.dot(dropped.to(do.dtype), do, dv, input_precision=PRECISION)
                ds = (
                    dropped * dp - p * delta[None, :]
                    if FLAGS.has_dropout
                    else p * (dp - delta[None, :])
                )
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
                is_last = start + BLOCK_M >= high
                start = tl.where(is_last, begin, start + BLOCK_M)
                head = tl.where(is_last, head + 1, head)
                advance = tl.where(is_last, rewind, BLOCK_M)
                q_tile += advance * stride_t + tl.where(is_last, stride_h, 0)
                do_tile += advance * strides.dout_token + tl.where(is_last, strides.dout_head, 0)
                stats_tile += (advance + tl.where(is_last, total_q, 0)) * 4
    row_dk = (token_k * strides.dk_token + head_kv.to(tl.int64) * strides.dk_head)[:, None]
    dk_rows = pointers.dk + row_dk + pairs[None, :]
    dv_rows = pointers.dv + row_dk + columns[None, :]
    dk = dk * dk_scale
    dv = dv * keep_scale
    if IS_SUCC:
        turns, turns_rest = load_frequencies(pointers.inv_freq, TILE.head_dim, BLOCK_D)
        moved = tl.cast(chunk_length, tl.float32)
        cos, sin = cos_sin(moved, turns[None, :], turns_rest[None, :])  # [1, BLOCK_D / 2]
        dk = rotate(dk, cos, sin, BLOCK_N, BLOCK_D)
    elif first < succ_end:
        dk += load_pairs(dk_rows, key, succ_end, TILE.head_dim, BLOCK_D, True).to(tl.float32)
        dv += load_rows(dv_rows, key, succ_end, columns, TILE.head_dim, BLOCK_D, True).to(
            tl.float32
        )
    store_pairs(dk_rows, dk, key, length_k, TILE.head_dim, BLOCK_D)
    store_rows(dv_rows, dv, key, length_k, columns, TILE.head_dim, BLOCK_D)
