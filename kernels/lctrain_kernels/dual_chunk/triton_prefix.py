"""The kernel that computes dual chunk attention to prefixes which several requests share."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from lctrain_kernels.decode.triton_attend import attend
from lctrain_kernels.decode.triton_prefix import GroupPointers
from lctrain_kernels.decode.triton_tile import (
    RUNTIME_INTEGERS,
    DecodePointers,
    DecodeStrides,
    load_queries,
)
from lctrain_kernels.tile.logits import logits_multiplier


class RangePointers(NamedTuple):
    """Pointers to the ranges of keys of every query, [3, B, Sq] int32."""

    starts: Any
    ends: Any


@triton.jit(do_not_specialize=[*RUNTIME_INTEGERS, "requests", "row_tiles", "splits"])
def dual_chunk_prefix_kernel(
    pointers: DecodePointers,
    groups: GroupPointers,
    ranges: RangePointers,
    strides: DecodeStrides,
    requests,
    seqlen_q,
    heads_kv,
    split_size,
    max_splits,
    row_tiles,
    splits,
    scale,
    TILE: tl.constexpr,
    FLAGS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Computes the unnormalised attention of all queries of a group over splits of its prefix.

    Shapes: q [3 * B, Sq, H, D], the queries for the keys of earlier chunks, of the chunk before,
    and of their own chunk; partial [B, max_splits, Hk, Sq * GROUP, D] float32; stats [B,
    max_splits, Hk, Sq * GROUP, 2] float32. Slot i of a request is split i of its prefix.

    Requests of a group stand at different positions, so a key may be in the own chunk of one, and
    in the chunk before of another. A row of a tile is a query with its own rotation and its own
    range of keys. A program visits the ranges one after another: for each, the keys that any of its
    rows has in that range, with a mask by row. If all rows are in one chunk, it reads every key
    once. One online softmax adds the ranges up.

    Rows, groups and grid are those of decode_prefix_kernel.

    Args:
        pointers: Described in decode/triton_attention.py, as are strides and all from scale on.
        groups: Groups of SharedPrefixes.
        ranges: First key, and key after the last one, of each query in each range.
        requests: Number of requests B.
        seqlen_q: Queries of a request.
        heads_kv: Number of key/value heads Hk.
        split_size: Keys of a split, a multiple of BLOCK_N.
        max_splits: Slots of a request.
        row_tiles: Tiles of rows of the largest group.
        splits: Splits of the longest prefix.
    """
    BLOCK_M: tl.constexpr = TILE.block_m
    BLOCK_D: tl.constexpr = TILE.block_d
    columns = tl.arange(0, BLOCK_D)
    pid = tl.program_id(0)
    head_kv = pid % heads_kv
    tile = pid // heads_kv % row_tiles
    split = pid // heads_kv // row_tiles % splits
    group = groups.groups + 3 * (pid // heads_kv // row_tiles // splits)
    members = groups.members + tl.load(group)
    tokens = tl.load(group + 2)
    rows = seqlen_q * TILE.group
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    all_rows = rows * tl.load(group + 1)
    valid = row < all_rows
    begin = split * split_size
    end = tl.minimum(begin + split_size, tokens)
    if (begin < end) & (tile * BLOCK_M < all_rows):
        request = tl.load(members + row // rows, mask=valid, other=0)
        position = row % rows // TILE.group
        head = head_kv * TILE.group + row % TILE.group
        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        l = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for part in tl.range(0, 3):
            source = part * requests + request
            place = source.to(tl.int64) * seqlen_q + position
            first = tl.maximum(tl.load(ranges.starts + place, mask=valid, other=0), begin)
            last = tl.minimum(tl.load(ranges.ends + place, mask=valid, other=0), end)
            seen = valid & (first < last)
            low = tl.min(tl.where(seen, first, end), 0) // TILE.block_n * TILE.block_n
            high = tl.max(tl.where(seen, last, begin), 0)
            if low < high:
                q = load_queries(
                    pointers,
                    strides,
                    source,
                    0,
                    head,
                    position,
                    0,
                    0,
                    valid,
                    TILE,
                    FLAGS,
                )
                m, l, acc = attend(
                    q,
                    m,
                    l,
                    acc,
                    low,
                    high,
                    pointers,
                    strides,
                    tl.load(members),
                    head_kv,
                    heads_kv,
                    0,
                    tokens,
                    last - 1,
                    tl.where(seen, last - 1 - first, -1),
                    0,
                    scale,
                    0.0,
                    0.0,
                    logits_multiplier(scale, False, False),
                    TILE,
                    FLAGS,
                    PRECISION,
                )
        item = request.to(tl.int64) * max_splits + split
        place = (item * heads_kv + head_kv) * rows + row % rows
        inside = valid[:, None] & (columns < TILE.head_dim)[None, :]
        partial = pointers.partial + place[:, None] * TILE.head_dim + columns[None, :]
        tl.store(partial, acc, mask=inside)
        tl.store(pointers.stats + 2 * place, m, mask=valid)
        tl.store(pointers.stats + 2 * place + 1, l, mask=valid)
