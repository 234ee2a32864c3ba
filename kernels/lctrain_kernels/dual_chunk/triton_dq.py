"""The portable backward kernel of dual chunk attention that computes dq."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from lctrain_kernels.dual_chunk.ranges import (
    SUCC,
    inter_delta,
    inter_end,
    keys_of_query,
    keys_of_tile,
)
from lctrain_kernels.tile.arguments import RUNTIME_INTEGERS
from lctrain_kernels.tile.dropout import dropout_head, keep_mask, load_key
from lctrain_kernels.tile.logits import LOG2_E
from lctrain_kernels.tile.mask import mask_logits
from lctrain_kernels.tile.memory import load_rows
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


class DqPointers(NamedTuple):
    """Pointers to the tensors that dual_chunk_dq_kernel accesses.

    The kernel's docstring gives the shapes of operands and results. Boundaries, tiles, document_ids
    and query_offsets are those of TiledPack; options are those of AttentionOptions.
    """

    q: Any
    k: Any
    k_succ: Any
    v: Any
    dout: Any
    stats: Any
    dq: Any
    cu_seqlens_q: Any
    cu_seqlens_k: Any
    tiles: Any
    inv_freq: Any
    logit_scale: Any
    dropout_seed: Any
    document_ids: Any
    query_offsets: Any


class DqStrides(NamedTuple):
    """Strides of tokens and of heads of each tensor, in elements."""

    q_token: Any
    q_head: Any
    k_token: Any
    k_head: Any
    k_succ_token: Any
    k_succ_head: Any
    v_token: Any
    v_head: Any
    dout_token: Any
    dout_head: Any
    dq_token: Any
    dq_head: Any


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def dual_chunk_dq_kernel(
    pointers: DqPointers,
    strides: DqStrides,
    num_tiles,
    total_q,
    chunk_length,
    succ_length,
    inter_position,
    scale,
    threshold,
    keep_scale,
    first_head,
    TILE: tl.constexpr,
    FLAGS: tl.constexpr,
    IS_INTER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Computes dq of a tile of queries, in two launches over the ranges of ranges.py.

    - With IS_INTER, dq holds the queries at the inter position at launch. They are multiplied by
      the INTER keys; their gradient is rotated back and stored in dq.
    - Without IS_INTER, unrotated queries are multiplied by keys rotated by -c (SUCC) and by
      unrotated keys (INTRA). At launch, dq holds the INTER part, which is added.

    In one launch, the rotation between two loops would make ptxas serialise the products (C7515).

    Grid: that of varlen_fwd_kernel. q, dout, dq are [T, H, D]; k, v [Tk, Hk, D]; dual_chunk_rotate
    writes k_succ [Tk, Hk, D] and stats [H, T, 4].

    chunk_length is c, the number of tokens of a chunk; succ_length the number of SUCC queries at
    the start of a chunk; inter_position the position to which INTER queries are rotated.
    tile/arguments.py describes the arguments that are not named here.
    """
    BLOCK_M: tl.constexpr = TILE.block_m
    BLOCK_N: tl.constexpr = TILE.block_n
    BLOCK_D: tl.constexpr = TILE.block_d
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
    last = tl.minimum(first + POSITIONS, length_q) - 1 + shift
    has_inter = inter_end(last, chunk_length, succ_length) > 0
    if IS_INTER and not has_inter:
        return

    local_m = tl.arange(0, BLOCK_M)
    local_n = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_D)
    pairs = pair_columns(TILE.head_dim, BLOCK_D)
    local_query = local_m % POSITIONS
    query = first + local_query
    inside = query < length_q
    position = query + shift
    tile_head = head_kv * TILE.group + head_group * TILE.pack + local_m // POSITIONS
    head = tl.where(inside, tile_head, 0).to(tl.int64)
    token = begin_q + query
    row_do = token * strides.dout_token + head * strides.dout_head
    do = load_rows(
        pointers.dout + row_do[:, None] + columns[None, :],
        query,
        length_q,
        columns,
        TILE.head_dim,
        BLOCK_D,
        True,
    )
    row_lse = head * total_q + token
    lse2 = tl.load(pointers.stats + row_lse * 4, mask=inside, other=float("inf"))
    delta = tl.load(pointers.stats + row_lse * 4 + 1, mask=inside, other=0.0)
    k_intra = pointers.k + begin_k * strides.k_token + head_kv.to(tl.int64) * strides.k_head
    k_succ = (
        pointers.k_succ
        + begin_k * strides.k_succ_token
        + head_kv.to(tl.int64) * strides.k_succ_head
    )
    v_base = pointers.v + begin_k * strides.v_token + head_kv.to(tl.int64) * strides.v_head
    tile_v = local_n[:, None] * strides.v_token + columns[None, :]
    if IS_INTER:
        q_rows = (
            pointers.dq
            + (token * strides.dq_token + head * strides.dq_head)[:, None]
            + pairs[None, :]
        )
    else:
        q_rows = (
            pointers.q + (token * strides.q_token + head * strides.q_head)[:, None] + pairs[None, :]
        )
    q = load_pairs(q_rows, query, length_q, TILE.head_dim, BLOCK_D, True)
    key_0 = 0
    key_1 = 0
    document_key = 0
    query_offset = 0
    if FLAGS.has_dropout:
        key_0, key_1, document_key, query_offset = load_key(
            pointers.dropout_seed, pointers.document_ids, pointers.query_offsets, document
        )
    multiplier = scale * _LOG2_E
    dq_scale = scale * keep_scale
    if pointers.logit_scale is not None:
        factor = tl.load(pointers.logit_scale + document)
        multiplier *= factor
        dq_scale *= factor

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # Unrolled, so that the loops do not carry the strides of k.
    for relation in tl.static_range(0 if IS_INTER else 1, 1 if IS_INTER else 3):
        low, clear, high = keys_of_tile(
            first + shift, last, relation, chunk_length, succ_length, BLOCK_N, FLAGS.has_dropout
        )
        first_seen, last_seen = keys_of_query(position, relation, chunk_length, succ_length)
        stride_k = tl.where(relation == SUCC, strides.k_succ_token, strides.k_token)
        k_base = tl.where(relation == SUCC, k_succ, k_intra)
        tile_k = local_n[:, None] * stride_k + pairs[None, :]
        # Tiles without a mask, then those with one.
        for part in tl.static_range(0, 2):
            begin = low if part == 0 else clear
            end = clear if part == 0 else high
            # As in dual_chunk_fwd_kernel.
            if begin < end:
                k_tile = k_base + tl.cast(begin, tl.int64) * stride_k
                v_tile = v_base + tl.cast(begin, tl.int64) * strides.v_token
                for n in tl.range(begin, end, BLOCK_N):
                    key = n + local_n
                    k = load_pairs(
                        k_tile + tile_k, key, length_k, TILE.head_dim, BLOCK_D, part == 1
                    )
                    v = load_rows(
                        v_tile + tile_v,
                        key,
                        length_k,
                        columns,
                        TILE.head_dim,
                        BLOCK_D,
                        part == 1,
                    )
                    x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
                    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
                    if part == 1:
                        x = mask_logits(
                            x, local_n[None, :], first_seen - n, last_seen - n, True, True
                        )
                    p = tl.exp2(x * multiplier - lse2[:, None])
                    if FLAGS.has_dropout:
                        keep = keep_mask(
                            key_0,
                            key_1,
                            document_key,
                            dropout_head(tile_head, first_head)[:, None].to(tl.uint32),
                            first + query_offset,
                            local_query[:, None],
                            n,
                            local_n[None, :],
                            threshold,
                        )
                        ds = tl.where(keep, p, 0.0) * dp - p * delta[:, None]
                    else:
                        ds = p * (dp - delta[:, None])
                    dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
                    k_tile += BLOCK_N * stride_k
                    v_tile += BLOCK_N * strides.v_token
    dq = dq * dq_scale
    dq_rows = (
        pointers.dq + (token * strides.dq_token + head * strides.dq_head)[:, None] + pairs[None, :]
    )
    if IS_INTER:
        turns, turns_rest = load_frequencies(pointers.inv_freq, TILE.head_dim, BLOCK_D)
        moved = inter_delta(position, chunk_length, inter_position)
        cos, sin = cos_sin(moved[:, None], turns[None, :], turns_rest[None, :])
        dq = rotate(dq, cos, -sin, BLOCK_M, BLOCK_D)
    elif has_inter:
        inter_rows = tl.where(inter_end(position, chunk_length, succ_length) > 0, query, length_q)
        dq += load_pairs(dq_rows, inter_rows, length_q, TILE.head_dim, BLOCK_D, True).to(tl.float32)
    store_pairs(dq_rows, dq, query, length_q, TILE.head_dim, BLOCK_D)
