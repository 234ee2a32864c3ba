"""The kernel that merges the splits of a decode call, in their order."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from lctrain_kernels.decode.triton_attend import merge_step
from lctrain_kernels.decode.triton_tile import (
    RUNTIME_INTEGERS,
    request_bounds,
    request_queries,
    shared_tokens,
    slot_range,
    store_result,
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
    cu_seqlens_q: Any
    prefix: Any
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
    lse_stride,
    max_splits,
    value_scale,
    TILE: tl.constexpr,
    FLAGS: tl.constexpr,
    ROWS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Computes out and lse of ROWS rows of a tile from the results of decode_split_kernel.

    Shapes: partial [B, max_splits, Hk, Sq * GROUP, D] and stats [B, max_splits, Hk, Sq * GROUP, 2]
    float32; out [B, Sq, H, D], lse [B, H, Sq] float32, with cu_seqlens_q [T, H, D] and [H, T]. The
    grid has one axis: requests x key/value heads x blocks of ROWS rows. triton_attention.py
    describes the arguments that are not named here.

    Args:
        pointers: Tensors.
        lse_stride: Stride of heads in lse.
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
    first, queries = request_queries(pointers.cu_seqlens_q, request, seqlen_q)
    tile = block * ROWS // TILE.block_m
    low, high = tile_keys(tile, queries, length, window_left, window_right, TILE, FLAGS)
    prefix = shared_tokens(pointers.prefix, request)
    first_slot, end_slot = slot_range(low, high, prefix, split_size)
    end_slot = tl.minimum(end_slot, max_splits)
    row = block * ROWS + tl.arange(0, ROWS)
    valid = row < queries * TILE.group
    inside = valid[:, None] & (columns < TILE.head_dim)[None, :]
    m = tl.full([ROWS], float("-inf"), tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for start in tl.range(first_slot, end_slot, UNROLL):
        loaded = ()  # all loads come before the first merge, which waits for one of them
        for step in tl.static_range(UNROLL):
            known = valid & (start + step + row * 0 < end_slot)
            item = request.to(tl.int64) * max_splits + start + step
            place = (item * heads_kv + head_kv) * rows + row
            ptrs = pointers.partial + place[:, None] * TILE.head_dim + columns[None, :]
            acc_split = tl.load(ptrs, mask=inside & known[:, None], other=0.0)
            stats = pointers.stats + 2 * place
            m_split = tl.load(stats, mask=known, other=float("-inf"))
            l_split = tl.load(stats + 1, mask=known, other=0.0)
            loaded = loaded + ((m_split, l_split, acc_split),)  # type: ignore[assignment] # noqa: RUF005
        for step in tl.static_range(UNROLL):
            m, l, acc = merge_step(m, l, acc, loaded[step][0], loaded[step][1], loaded[step][2])
    position = row // TILE.group
    head = head_kv * TILE.group + row % TILE.group
    if pointers.learnable_sink is not None:
        sink = tl.load(pointers.learnable_sink + head, mask=valid, other=0.0)
        acc, m, l = add_sink(acc, m, l, sink.to(tl.float32) * _LOG2_E)
    out, lse = finish(acc, m, l, value_scale)
    heads = heads_kv * TILE.group
    store_result(pointers, out, lse, request, first, position, head, heads, lse_stride, valid, TILE)
