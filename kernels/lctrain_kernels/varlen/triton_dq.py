"""The portable backward kernel of varlen attention that computes dq."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from lctrain_kernels.tile.arguments import RUNTIME_INTEGERS
from lctrain_kernels.tile.dropout import dropout_head, keep_mask, load_key
from lctrain_kernels.tile.logits import LOG2_E, logits, logits_multiplier, softcap_slope
from lctrain_kernels.tile.mask import key_ranges, load_window, mask_logits
from lctrain_kernels.tile.memory import load_rows, store_rows
from lctrain_kernels.tile.seqlen import document_bounds, locate_program

_LOG2_E = tl.constexpr(LOG2_E)


class DqPointers(NamedTuple):
    """Pointers to the tensors that varlen_dq_kernel accesses.

    The kernel's docstring gives the shapes of operands and results. Boundaries, tiles, document_ids
    and query_offsets are those of TiledPack; options are those of AttentionOptions.
    """

    q: Any
    k: Any
    v: Any
    out: Any
    dout: Any
    lse: Any
    dlse: Any
    dq: Any
    delta: Any
    stats: Any
    cu_seqlens_q: Any
    cu_seqlens_k: Any
    tiles: Any
    window: Any
    alibi_slopes: Any
    dropout_seed: Any
    document_ids: Any
    query_offsets: Any


class DqStrides(NamedTuple):
    """Strides of tokens and of heads of each tensor, in elements."""

    q_token: Any
    q_head: Any
    k_token: Any
    k_head: Any
    v_token: Any
    v_head: Any
    out_token: Any
    out_head: Any
    dout_token: Any
    dout_head: Any
    dq_token: Any
    dq_head: Any


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def varlen_dq_kernel(
    pointers: DqPointers,
    strides: DqStrides,
    stride_alibi,
    num_tiles,
    total_q,
    window_left,
    window_right,
    scale,
    softcap,
    threshold,
    keep_scale,
    first_head,
    TILE: tl.constexpr,
    FLAGS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Computes dq of a tile of queries, and writes the statistics that the dk, dv kernel reads.

    Grid: that of varlen_fwd_kernel.

    - q, out, dout, dq [T, H, D]; k, v [Tk, Hk, D].
    - lse (read), dlse (read) and delta = rowsum(dout * out) - dlse (written): [H, T] float32.
    - stats [H, T, 4] float32 (written): base-2 lse (+inf for a query that saw no key), delta /
      keep_scale, and two unused numbers.

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
    local_query = local_m % POSITIONS
    query = first + local_query
    inside = query < length_q
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
    row_o = token * strides.out_token + head * strides.out_head
    o = load_rows(
        pointers.out + row_o[:, None] + columns[None, :],
        query,
        length_q,
        columns,
        TILE.head_dim,
        BLOCK_D,
        True,
    )
    row_lse = head * total_q + token
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if pointers.dlse is not None:
        delta -= tl.load(pointers.dlse + row_lse, mask=inside, other=0.0)
    lse = tl.load(pointers.lse + row_lse, mask=inside, other=float("inf"))
    # lse = +inf gives a query that saw no key weights of 2^(x - inf) = 0.
    lse2 = tl.where(lse == float("-inf"), float("inf"), lse * _LOG2_E)
    tl.store(pointers.stats + row_lse * 4, lse2, mask=inside)
    tl.store(pointers.delta + row_lse, delta, mask=inside)
    # With the factor Z of dropout (0 or keep_scale),
    # ds / keep_scale = (Z / keep_scale) p dp - p delta / keep_scale.
    # The factor keep_scale is applied to dq and dk at the end.
    delta = delta / keep_scale
    tl.store(pointers.stats + row_lse * 4 + 1, delta, mask=inside)

    row_q = token * strides.q_token + head * strides.q_head
    q = load_rows(
        pointers.q + row_q[:, None] + columns[None, :],
        query,
        length_q,
        columns,
        TILE.head_dim,
        BLOCK_D,
        True,
    )
    k_base = pointers.k + begin_k * strides.k_token + head_kv.to(tl.int64) * strides.k_head
    v_base = pointers.v + begin_k * strides.v_token + head_kv.to(tl.int64) * strides.v_head
    tile_k = local_n[:, None] * strides.k_token + columns[None, :]
    tile_v = local_n[:, None] * strides.v_token + columns[None, :]
    slope = 0.0
    if FLAGS.has_alibi:
        slope = tl.load(pointers.alibi_slopes + document * stride_alibi + head)[:, None]
    key_0 = 0
    key_1 = 0
    document_key = 0
    query_offset = 0
    if FLAGS.has_dropout:
        key_0, key_1, document_key, query_offset = load_key(
            pointers.dropout_seed, pointers.document_ids, pointers.query_offsets, document
        )
    multiplier = logits_multiplier(scale, FLAGS.has_softcap, FLAGS.has_alibi)
    first_seen = query + shift - left
    last_seen = tl.minimum(query + shift + right, length_k - 1)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # Ranges of key tiles: those that the left bound cuts, those without a mask, the diagonal's.
    for part in tl.static_range(0 if FLAGS.has_left else 1, 3):
        begin = low if part == 0 else (clear_low if part == 1 else clear_high)
        end = clear_low if part == 0 else (clear_high if part == 1 else high)
        # The branch skips the loop for an empty range, and pointers advance by addition. Without
        # either, ptxas may serialise the products (C7515).
        if begin < end:
            k_tile = k_base + tl.cast(begin, tl.int64) * strides.k_token
            v_tile = v_base + tl.cast(begin, tl.int64) * strides.v_token
            for n in tl.range(begin, end, BLOCK_N):
                key = n + local_n
                k = load_rows(
                    k_tile + tile_k,
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
                    columns,
                    TILE.head_dim,
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
                    FLAGS.has_softcap,
                    FLAGS.has_alibi,
                )
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
                if FLAGS.has_softcap:
                    ds = ds * softcap_slope(s, scale, softcap)
                dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
                k_tile += BLOCK_N * strides.k_token
                v_tile += BLOCK_N * strides.v_token
    row_dq = token * strides.dq_token + head * strides.dq_head
    store_rows(
        pointers.dq + row_dq[:, None] + columns[None, :],
        dq * (scale * keep_scale),
        query,
        length_q,
        columns,
        TILE.head_dim,
        BLOCK_D,
    )
