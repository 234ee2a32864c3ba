"""The kernel that computes prefixes which several requests share, once for all of them."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from lctrain_kernels.decode.triton_attend import attend
from lctrain_kernels.decode.triton_tile import (
    RUNTIME_INTEGERS,
    DecodePointers,
    DecodeStrides,
    load_queries,
    request_bounds,
)
from lctrain_kernels.tile.logits import logits_multiplier


class GroupPointers(NamedTuple):
    """Pointers to the groups of SharedPrefixes."""

    members: Any
    groups: Any


@triton.jit(do_not_specialize=[*RUNTIME_INTEGERS, "row_tiles", "splits"])
def decode_prefix_kernel(
    pointers: DecodePointers,
    groups: GroupPointers,
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
    row_tiles,
    splits,
    scale,
    softcap,
    TILE: tl.constexpr,
    FLAGS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Computes the unnormalised attention of all queries of a group over splits of its prefix.

    Shapes: q [B, Sq, H, D]; partial [B, max_splits, Hk, Sq * GROUP, D] float32; stats [B,
    max_splits, Hk, Sq * GROUP, 2] float32. Slot i of a request is split i of its prefix. The keys
    are those of the pages of the group's first request.

    Rows of a tile are the rows of the first request, then those of the second, and so on. The grid
    has one axis: groups x splits x tiles of rows x key/value heads.

    Args:
        pointers: Described in triton_attention.py, as are all that follow but these four.
        groups: Members, [M] int32, the requests of all groups; groups, [G, 3] int32: index of the
            first member, number of members, tokens of the prefix.
        max_splits: Slots of a request.
        row_tiles: Tiles of rows of the largest group.
        splits: Splits of the longest prefix.
    """
    BLOCK_M: tl.constexpr = TILE.block_m
    BLOCK_D: tl.constexpr = TILE.block_d
    HAS_ALIBI: tl.constexpr = pointers.alibi_slopes is not None
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
        stored, _, length = request_bounds(
            pointers.seqlens, pointers.leftpad, request, new_tokens, capacity
        )
        q = load_queries(
            pointers,
            strides,
            request,
            0,
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
            tl.load(members),
            head_kv,
            heads_kv,
            0,
            tokens,
            position + length - seqlen_q,
            window_left,
            window_right,
            scale,
            softcap,
            slope,
            logits_multiplier(scale, FLAGS.has_softcap, HAS_ALIBI),
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
