"""The kernel that merges the splits of a decode call, in their order."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from lctrain_kernels.decode.triton_tile import (
    RUNTIME_INTEGERS,
    merge_step,
    request_bounds,
    tile_keys,
)
from lctrain_kernels.tile.logits import LOG2_E
from lctrain_kernels.tile.softmax import add_sink, finish

_LOG2_E = tl.constexpr(LOG2_E)


class MergePointers(NamedTuple):
    """Pointers to the tensors of decode_merge_kernel."""

    partial: Any
    stats: Any
    out: Any
    lse: Any
    seqlens: Any
    leftpad: Any
    learnable_sink: Any


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def decode_merge_kernel(
    pointers: MergePointers,
    seqlen_q,
    new_tokens,
    capacity,
    heads_kv,
    window_left,
    window_right,
    split_size,
    max_splits,
    value_scale,
    TILE: tl.constexpr,
    FLAGS: tl.constexpr,
    ROWS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Computes out and lse of ROWS rows of a tile from the results of decode_split_kernel.

    Shapes: partial [B, max_splits, Hk, Sq * GROUP, D] and stats [B, max_splits, Hk, Sq * GROUP, 2]
    float32; out [B, Sq, H, D], lse [B, H, Sq] float32. The grid has one axis: requests x key/value
    heads x blocks of ROWS rows. triton_attention.py describes the arguments that are not named
    here.

    Args:
        pointers: Tensors.
        ROWS: Rows of a program, a divisor of BLOCK_M.
        UNROLL: Splits whose results are loaded together.
    """
    BLOCK_D: tl.constexpr = TILE.block_d
    columns = tl.arange(0, BLOCK_D)
    rows = seqlen_q * TILE.group
    blocks = tl.cdiv(rows, ROWS)
    pid = tl.program_id(0)
    block = pid % blocks
    head_kv = pid // blocks % heads_kv
    request = pid // blocks // heads_kv
    _, _, length = request_bounds(pointers.seqlens, pointers.leftpad, request, new_tokens, capacity)
    tile = block * ROWS // TILE.block_m
    low, high = tile_keys(tile, seqlen_q, length, window_left, window_right, TILE, FLAGS)
    first_split = low // split_size
    end_split = tl.minimum(tl.cdiv(high, split_size), max_splits)
    row = block * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    inside = valid[:, None] & (columns < TILE.head_dim)[None, :]
    m = tl.full([ROWS], float("-inf"), tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for first in tl.range(first_split, end_split, UNROLL):
        for step in tl.static_range(UNROLL):
            split = first + step
            known = split < end_split
            item = request.to(tl.int64) * max_splits + split
            place = (item * heads_kv + head_kv) * rows + row
            ptrs = pointers.partial + place[:, None] * TILE.head_dim + columns[None, :]
            acc_split = tl.load(ptrs, mask=inside & known, other=0.0)
            stats = pointers.stats + 2 * place
            m_split = tl.load(stats, mask=valid & known, other=float("-inf"))
            l_split = tl.load(stats + 1, mask=valid & known, other=0.0)
            m, l, acc = merge_step(m, l, acc, m_split, l_split, acc_split)
    position = row // TILE.group
    head = head_kv * TILE.group + row % TILE.group
    if pointers.learnable_sink is not None:
        sink = tl.load(pointers.learnable_sink + head, mask=valid, other=0.0)
        acc, m, l = add_sink(acc, m, l, sink.to(tl.float32) * _LOG2_E)
    out, lse = finish(acc, m, l, value_scale)
    heads = heads_kv * TILE.group
    place = (request.to(tl.int64) * seqlen_q + position) * heads + head
    ptrs = pointers.out + place[:, None] * TILE.head_dim + columns[None, :]
    tl.store(ptrs, out.to(pointers.out.dtype.element_ty), mask=inside)
    place = (request.to(tl.int64) * heads + head) * seqlen_q + position
    tl.store(pointers.lse + place, lse, mask=valid)
