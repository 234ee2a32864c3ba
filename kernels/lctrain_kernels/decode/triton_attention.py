"""The attention kernels of a decode call: one split of the keys, or all keys of a request.

Both kernels take these arguments:

- pointers, strides: DecodePointers and DecodeStrides.
- stride_alibi: Stride between the ALiBi slopes of two requests; 0 if they share them.
- seqlen_q: Queries of a request, Sq; of the longest one if pointers.cu_seqlens_q is given.
- new_tokens: Tokens that the call appended to each request.
- capacity: Most tokens of a request.
- heads_kv: Number of key/value heads Hk.
- rotary_rows: Number of rows of the tables of cosines and sines.
- window_left, window_right: Visible keys before and after a query's own position, if bounded.
- split_size: Keys of a split, a multiple of BLOCK_N.
- scale: softmax_scale, the factor of q.k.
- softcap: Softcap c, which replaces a logit x by c tanh(x / c).
- value_scale: Factor of the output, 1.
- TILE: Sizes of the tile, a DecodeShape. GROUP, BLOCK_M and BLOCK_N are its fields.
- FLAGS: Features of the call, a DecodeFlags.
- PRECISION: Precision of matrix products, for tl.dot.
"""

import triton
import triton.language as tl

from lctrain_kernels.decode.triton_attend import attend, merge_step
from lctrain_kernels.decode.triton_tile import (
    RUNTIME_INTEGERS,
    DecodePointers,
    DecodeStrides,
    load_queries,
    request_bounds,
    request_queries,
    shared_tokens,
    store_result,
    tile_keys,
    tile_rows,
)
from lctrain_kernels.tile.logits import LOG2_E, logits_multiplier
from lctrain_kernels.tile.softmax import add_sink, finish

_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def decode_split_kernel(
    pointers: DecodePointers,
    strides: DecodeStrides,
    stride_alibi,
    seqlen_q,
    new_tokens,
    capacity,
    heads_kv,
    rotary_rows,
    window_left,
    window_right,
    split_size,
    max_splits,
    items,
    scale,
    softcap,
    TILE: tl.constexpr,
    FLAGS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Computes the unnormalised attention of tiles of queries over single splits of the keys.

    Shapes: q [B, Sq, H, D], or [T, H, D] with cu_seqlens_q; partial [B, max_splits, Hk, Sq * GROUP,
    D] float32; stats [B, max_splits, Hk, Sq * GROUP, 2] float32, the maximum and the sum of the
    base-2 softmax.

    The grid has one axis. A program computes piece after piece. A piece is a split, a tile of rows
    and a key/value head; the heads of one split are neighbours. The number of programs is free.

    Args:
        pointers: Described in this module, as are all that follow but these two.
        max_splits: Splits of a request, at most.
        items: Number of splits of all requests. Split i has slot i % max_splits of request i //
            max_splits. If pointers.work is given, that list replaces both. Slots of a shared prefix
            belong to decode_prefix_kernel.
    """
    BLOCK_M: tl.constexpr = TILE.block_m
    BLOCK_D: tl.constexpr = TILE.block_d
    HAS_ALIBI: tl.constexpr = pointers.alibi_slopes is not None
    columns = tl.arange(0, BLOCK_D)
    rows = seqlen_q * TILE.group
    row_tiles = tl.cdiv(rows, BLOCK_M)
    multiplier = logits_multiplier(scale, FLAGS.has_softcap, HAS_ALIBI)
    if pointers.work is not None:
        items = tl.load(pointers.work)
    for piece in tl.range(tl.program_id(0), items * row_tiles * heads_kv, tl.num_programs(0)):
        head_kv = piece % heads_kv
        tile = piece // heads_kv % row_tiles
        item = piece // heads_kv // row_tiles
        if pointers.work is not None:
            item = tl.load(pointers.work + 1 + item)
        request = item // max_splits
        prefix = shared_tokens(pointers.prefix, request)
        split = item % max_splits - tl.cdiv(prefix, split_size)
        first, queries = request_queries(pointers.cu_seqlens_q, request, seqlen_q)
        stored, leftpad, length = request_bounds(
            pointers.seqlens, pointers.leftpad, request, new_tokens, capacity
        )
        row, valid, position, member = tile_rows(tile, queries * TILE.group, TILE)
        head = head_kv * TILE.group + member
        low, high = tile_keys(tile, queries, length, window_left, window_right, TILE, FLAGS)
        begin = tl.maximum(prefix + split * split_size, low)
        end = tl.minimum(prefix + (split + 1) * split_size, high)
        if (begin < end) & (split >= 0):
            q = load_queries(
                pointers,
                strides,
                request,
                first,
                head,
                position,
                stored,
                rotary_rows,
                valid,
                TILE,
                FLAGS,
            )
            slope = 0.0
            if HAS_ALIBI:
                slopes = pointers.alibi_slopes + request * stride_alibi + head
                slope = tl.load(slopes, mask=valid, other=0.0)[:, None]
            m, l, acc = attend(
                q,
                tl.full([BLOCK_M], float("-inf"), tl.float32),
                tl.zeros([BLOCK_M], tl.float32),
                tl.zeros([BLOCK_M, BLOCK_D], tl.float32),
                begin,
                end,
                pointers,
                strides,
                request,
                head_kv,
                heads_kv,
                leftpad,
                length,
                position + length - queries,
                window_left,
                window_right,
                scale,
                softcap,
                slope,
                multiplier,
                TILE,
                FLAGS,
                PRECISION,
            )
            place = (tl.cast(item, tl.int64) * heads_kv + head_kv) * rows + row
            inside = valid[:, None] & (columns < TILE.head_dim)[None, :]
            partial = pointers.partial + place[:, None] * TILE.head_dim + columns[None, :]
            tl.store(partial, acc, mask=inside)
            tl.store(pointers.stats + 2 * place, m, mask=valid)
            tl.store(pointers.stats + 2 * place + 1, l, mask=valid)


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def decode_whole_kernel(
    pointers: DecodePointers,
    strides: DecodeStrides,
    stride_alibi,
    seqlen_q,
    new_tokens,
    capacity,
    heads_kv,
    rotary_rows,
    window_left,
    window_right,
    split_size,
    lse_stride,
    scale,
    softcap,
    value_scale,
    TILE: tl.constexpr,
    FLAGS: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_SPLITS: tl.constexpr,
):
    """Computes out and lse of a tile of queries over all keys that they see.

    Shapes: q and out [B, Sq, H, D], lse [B, H, Sq] float32; with cu_seqlens_q [T, H, D] and [H, T].
    The grid has one axis: requests x tiles of rows x key/value heads.

    Args:
        pointers: Described in this module, as are all that follow but these two.
        lse_stride: Stride of heads in lse.
        HAS_SPLITS: Whether the keys are computed split by split and merged in order, as
            decode_split_kernel and decode_merge_kernel do. Otherwise the order is that of
            varlen_fwd_kernel.
    """
    BLOCK_M: tl.constexpr = TILE.block_m
    BLOCK_D: tl.constexpr = TILE.block_d
    HAS_ALIBI: tl.constexpr = pointers.alibi_slopes is not None
    row_tiles = tl.cdiv(seqlen_q * TILE.group, BLOCK_M)
    pid = tl.program_id(0)
    head_kv = pid % heads_kv
    tile = row_tiles - 1 - pid // heads_kv % row_tiles
    request = pid // heads_kv // row_tiles
    multiplier = logits_multiplier(scale, FLAGS.has_softcap, HAS_ALIBI)
    stored, leftpad, length = request_bounds(
        pointers.seqlens, pointers.leftpad, request, new_tokens, capacity
    )
    first, queries = request_queries(pointers.cu_seqlens_q, request, seqlen_q)
    _, valid, position, member = tile_rows(tile, queries * TILE.group, TILE)
    head = head_kv * TILE.group + member
    low, high = tile_keys(tile, queries, length, window_left, window_right, TILE, FLAGS)
    q = load_queries(
        pointers, strides, request, first, head, position, stored, rotary_rows, valid, TILE, FLAGS
    )
    slope = 0.0
    if HAS_ALIBI:
        slopes = pointers.alibi_slopes + request * stride_alibi + head
        slope = tl.load(slopes, mask=valid, other=0.0)[:, None]
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    first_split = 0
    end_split = 1
    if HAS_SPLITS:
        first_split = low // split_size
        end_split = tl.cdiv(high, split_size)
    for split in tl.range(first_split, end_split):
        begin = low
        end = high
        if HAS_SPLITS:
            begin = tl.maximum(split * split_size, low)
            end = tl.minimum((split + 1) * split_size, high)
        m_split, l_split, acc_split = attend(
            q,
            tl.full([BLOCK_M], float("-inf"), tl.float32),
            tl.zeros([BLOCK_M], tl.float32),
            tl.zeros([BLOCK_M, BLOCK_D], tl.float32),
            begin,
            end,
            pointers,
            strides,
            request,
            head_kv,
            heads_kv,
            leftpad,
            length,
            position + length - queries,
            window_left,
            window_right,
            scale,
            softcap,
            slope,
            multiplier,
            TILE,
            FLAGS,
            PRECISION,
        )
        if HAS_SPLITS:
            m, l, acc = merge_step(m, l, acc, m_split, l_split, acc_split)
        else:
            m, l, acc = m_split, l_split, acc_split
    if pointers.learnable_sink is not None:
        sink = tl.load(pointers.learnable_sink + head, mask=valid, other=0.0)
        acc, m, l = add_sink(acc, m, l, sink.to(tl.float32) * _LOG2_E)
    out, lse = finish(acc, m, l, value_scale)
    heads = heads_kv * TILE.group
    store_result(pointers, out, lse, request, first, position, head, heads, lse_stride, valid, TILE)
