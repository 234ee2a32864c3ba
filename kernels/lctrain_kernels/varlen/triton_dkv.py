"""The portable backward kernel of varlen attention that computes dk and dv."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from lctrain_kernels.tile.arguments import RUNTIME_INTEGERS
from lctrain_kernels.tile.dropout import dropout_head, keep_mask, load_key
from lctrain_kernels.tile.logits import logits, logits_multiplier, softcap_slope
from lctrain_kernels.tile.mask import load_window, query_ranges
from lctrain_kernels.tile.memory import load_rows, store_rows
from lctrain_kernels.tile.seqlen import document_bounds, locate_program


class DkvPointers(NamedTuple):
    """Pointers to the tensors that varlen_dkv_kernel accesses.

    The kernel's docstring gives the shapes of operands and results. Boundaries, tiles, document_ids
    and query_offsets are those of TiledPack; options are those of AttentionOptions.
    """

    q: Any
    k: Any
    v: Any
    dout: Any
    stats: Any
    dk: Any
    dv: Any
    cu_seqlens_q: Any
    cu_seqlens_k: Any
    tiles: Any
    window: Any
    alibi_slopes: Any
    dropout_seed: Any
    document_ids: Any
    query_offsets: Any


class DkvStrides(NamedTuple):
    """Strides of tokens and of heads of each tensor, in elements."""

    q_token: Any
    q_head: Any
    k_token: Any
    k_head: Any
    v_token: Any
    v_head: Any
    dout_token: Any
    dout_head: Any
    dk_token: Any
    dk_head: Any


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def varlen_dkv_kernel(
    pointers: DkvPointers,
    strides: DkvStrides,
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
    """Computes dk and dv of BLOCK_N keys of one key/value head, over all query heads of its group.

    Tiles of scores are transposed, keys by queries, so that the products for dv and dk read the
    weights from registers.

    - q, dout [T, H, D]; k, v, dk, dv [Tk, Hk, D]. dk and dv have the same strides.
    - stats [H, T, 4] float32, as varlen_dq_kernel writes it.

    Grid: (key/value heads * tiles * SCHEDULE_ROWS / BLOCK_N,).

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
    key = first + local_n
    token_k = begin_k + key
    k = load_rows(
        pointers.k
        + head_kv.to(tl.int64) * strides.k_head
        + (token_k * strides.k_token)[:, None]
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
        + head_kv.to(tl.int64) * strides.v_head
        + (token_k * strides.v_token)[:, None]
        + columns[None, :],
        key,
        length_k,
        columns,
        TILE.head_dim,
        BLOCK_D,
        True,
    )
    tile_q = local_m[:, None] * strides.q_token + columns[None, :]
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
    multiplier = logits_multiplier(scale, FLAGS.has_softcap, FLAGS.has_alibi)

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    # One loop runs over heads and queries, so that the load pipeline never drains between heads.
    blocks = tl.cdiv(high - low, BLOCK_M)
    head = head_kv * TILE.group
    start = low
    token = begin_q + low
    q_tile = pointers.q + token * strides.q_token + head.to(tl.int64) * strides.q_head
    do_tile = pointers.dout + token * strides.dout_token + head.to(tl.int64) * strides.dout_head
    stats_tile = pointers.stats + (head.to(tl.int64) * total_q + token) * 4
    rewind = tl.cast((1 - blocks) * BLOCK_M, tl.int64)
    # The loop has at least one step, which is fully masked if no query sees the keys. If an
    # accumulator could skip the loop, ptxas would serialise the products (C7515).
    steps = tl.maximum(blocks * TILE.group, 1)
    tl.assume(steps > 0)
    for _ in tl.range(0, steps):
        query = start + local_m
        q = load_rows(q_tile + tile_q, query, length_q, columns, TILE.head_dim, BLOCK_D, True)
        # As a tile of four numbers per query, the statistics are loaded once. A vector per number
        # would be loaded once per thread.
        stats = tl.load(stats_tile + tile_stats, mask=(query < length_q)[:, None], other=0.0)
        even, odd = tl.split(tl.reshape(stats, [BLOCK_M, 2, 2]))
        lse2, _ = tl.split(even)
        delta, _ = tl.split(odd)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        slope = 0.0
        if FLAGS.has_alibi:
            slope = tl.load(pointers.alibi_slopes + document * stride_alibi + head)
        x = logits(
            s,
            query[None, :],
            key[:, None],
            shift,
            scale,
            softcap,
            slope,
            FLAGS.has_softcap,
            FLAGS.has_alibi,
        )
        # LLVM turns this branch into selects. They take more instructions than masking every tile,
        # but the kernel is faster (bench/NOTES.md).
        if (start < clear_low) | (start >= clear_high):
            seen = key[:, None] < length_k
            if FLAGS.has_right:
                seen = seen & (key[:, None] - query[None, :] <= shift + right)
            if FLAGS.has_left:
                seen = seen & (key[:, None] - query[None, :] >= shift - left)
            x = tl.where(seen, x, float("-inf"))
        if FLAGS.has_alibi:
            # With a negative slope, logits of queries beyond the document grow without bound.
            x = tl.where((query < length_q)[None, :], x, float("-inf"))
        p = tl.exp2(x * multiplier - lse2[None, :])
        do = load_rows(do_tile + tile_do, query, length_q, columns, TILE.head_dim, BLOCK_D, True)
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
        ds = dropped * dp - p * delta[None, :] if FLAGS.has_dropout else p * (dp - delta[None, :])
        if FLAGS.has_softcap:
            ds = ds * softcap_slope(s, scale, softcap)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
        last = start + BLOCK_M >= high
        start = tl.where(last, low, start + BLOCK_M)
        head = tl.where(last, head + 1, head)
        step = tl.where(last, rewind, BLOCK_M)
        q_tile += step * strides.q_token + tl.where(last, strides.q_head, 0)
        do_tile += step * strides.dout_token + tl.where(last, strides.dout_head, 0)
        stats_tile += (step + tl.where(last, total_q, 0)) * 4
    row_dk = (token_k * strides.dk_token + head_kv.to(tl.int64) * strides.dk_head)[
        :, None
    ] + columns[None, :]
    store_rows(
        pointers.dk + row_dk,
        dk * (scale * keep_scale),
        key,
        length_k,
        columns,
        TILE.head_dim,
        BLOCK_D,
    )
    store_rows(
        pointers.dv + row_dk, dv * keep_scale, key, length_k, columns, TILE.head_dim, BLOCK_D
    )
