"""Device functions of the decode kernels: rows of a tile, keys of a cache, merge of splits.

A row of a tile is a query of one head. The rows of a request and a key/value head are numbered
position-major: row r is query position r // GROUP of query head r % GROUP of the group. So all
heads of a group read one tile of keys.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from lctrain_kernels.tile.logits import logits
from lctrain_kernels.tile.mask import mask_logits
from lctrain_kernels.tile.memory import load_rows
from lctrain_kernels.tile.softmax import softmax_step


class DecodePointers(NamedTuple):
    """Pointers to the tensors of the attention kernels.

    partial and stats are the results of splits; work is the list of decode/plan.py. The other
    tensors are those of KVCache, NewTokens and DecodeOptions.
    """

    q: Any
    k: Any
    v: Any
    out: Any
    lse: Any
    partial: Any
    stats: Any
    seqlens: Any
    batch_index: Any
    leftpad: Any
    block_table: Any
    work: Any
    cos: Any
    sin: Any
    alibi_slopes: Any
    learnable_sink: Any


class DecodeStrides(NamedTuple):
    """Strides in elements. A page of a dense cache is the row of a request."""

    q_batch: Any
    q_token: Any
    q_head: Any
    k_page: Any
    k_token: Any
    k_head: Any
    v_page: Any
    v_token: Any
    v_head: Any
    block_table: Any


class DecodeShape(NamedTuple):
    """Compile-time sizes of the attention kernels.

    Attributes:
        head_dim: Head dim D.
        block_d: Columns of a tile: the smallest power of two >= D, at least 16.
        group: Number of query heads per key/value head.
        block_m: Number of rows of a tile.
        block_n: Number of keys of a tile.
        page: Tokens of a page; 0 for a dense cache.
        rotary: Number of rotated columns; 0 without a rotation.
        scattered: Whether the keys of one tile may lie on several pages.
    """

    head_dim: int
    block_d: int
    group: int
    block_m: int
    block_n: int
    page: int
    rotary: int
    scattered: bool


class DecodeFlags(NamedTuple):
    """Constant flags of the features of a call.

    Attributes:
        has_left: Whether the window has a left bound.
        has_right: Whether the window has a right bound; a causal mask is one.
        has_softcap: Whether logits x become c * tanh(x / c).
        interleaved: Whether columns 2i and 2i + 1 are a pair of the rotation.
        rotates_each: Whether query i is rotated by i more positions than query 0.
    """

    has_left: bool
    has_right: bool
    has_softcap: bool
    interleaved: bool
    rotates_each: bool


RUNTIME_INTEGERS = [
    "seqlen_q",
    "new_tokens",
    "capacity",
    "window_left",
    "window_right",
    "split_size",
    "max_splits",
    "items",
    "heads_kv",
    "rotary_rows",
    "stride_alibi",
    "num_pages",
]


@triton.jit
def request_bounds(seqlens_ptr, leftpad_ptr, request, new_tokens, capacity):
    """Returns (tokens stored before the call, padding on the left, number of keys) of a request.

    Args:
        seqlens_ptr: Tokens stored before the call, [B] int32.
        leftpad_ptr: Padding on the left, [B] int32, or None.
        request: Index of the request; a tensor of indices works too.
        new_tokens: Number of appended tokens.
        capacity: Most tokens of a request; more are not read.
    """
    stored = tl.load(seqlens_ptr + request)
    leftpad = stored * 0
    if leftpad_ptr is not None:
        leftpad = tl.load(leftpad_ptr + request)
    length = tl.maximum(tl.minimum(stored + new_tokens, capacity) - leftpad, 0)
    return stored, leftpad, length


@triton.jit
def tile_rows(tile, rows, TILE: tl.constexpr):
    """Returns (row, whether it exists, query position, head in the group) of a tile, [BLOCK_M].

    Args:
        tile: Index of the tile.
        rows: Number of rows of a request and key/value head, Sq * GROUP.
        TILE: DecodeShape of the launch.
    """
    row = tile * TILE.block_m + tl.arange(0, TILE.block_m)
    return row, row < rows, row // TILE.group, row % TILE.group


@triton.jit
def tile_keys(tile, seqlen_q, length, left, right, TILE: tl.constexpr, FLAGS: tl.constexpr):
    """Returns the range (low, high) of key positions that any row of a tile sees.

    `low` is rounded down to a multiple of BLOCK_N.

    Args:
        tile: Index of the tile.
        seqlen_q: Queries of a request.
        length: Number of keys of the request.
        left: Visible keys before a query's own position, if FLAGS.has_left.
        right: Visible keys after a query's own position, if FLAGS.has_right.
        TILE: DecodeShape of the launch.
        FLAGS: DecodeFlags of the launch.
    """
    shift = length - seqlen_q
    low = length * 0
    high = length
    if FLAGS.has_right:
        end_row = tl.minimum((tile + 1) * TILE.block_m, seqlen_q * TILE.group)
        last = (end_row - 1) // TILE.group
        high = tl.minimum(high, tl.maximum(last + shift + right + 1, 0))
    if FLAGS.has_left:
        first = tile * TILE.block_m // TILE.group
        low = tl.minimum(tl.maximum(first + shift - left, 0), high)
        low = low // TILE.block_n * TILE.block_n
    return low, high


@triton.jit
def rotated_rows(
    ptrs,
    columns,
    inside,
    cos_ptr,
    sin_ptr,
    positions,
    rotary_rows,
    ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Loads rows [M, BLOCK_D] and rotates their first ROTARY columns, in float32.

    Args:
        ptrs: Addresses of the first column of each row, [M].
        columns: Index of each column, [BLOCK_D].
        inside: Mask of the elements that exist, [M, BLOCK_D].
        cos_ptr: Cosines [rotary_rows, ROTARY / 2].
        sin_ptr: Sines, in the shape of cos_ptr.
        positions: Position by which each row is rotated, [M].
        rotary_rows: Number of rows of the tables; positions without a row are not rotated.
        ROTARY: Number of rotated columns.
        INTERLEAVED: Whether columns 2i and 2i + 1 are a pair, instead of i and i + ROTARY / 2.
    """
    HALF: tl.constexpr = ROTARY // 2
    if INTERLEAVED:
        pair = columns // 2
        partner = columns ^ 1
        first = columns % 2 == 0
    else:
        pair = columns % HALF
        partner = tl.where(columns < HALF, columns + HALF, columns - HALF)
        first = columns < HALF
    known = (positions >= 0) & (positions < rotary_rows)
    turned = (columns < ROTARY)[None, :] & inside & known[:, None]
    x = tl.load(ptrs[:, None] + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    y = tl.load(ptrs[:, None] + partner[None, :], mask=turned, other=0.0).to(tl.float32)
    at = positions[:, None].to(tl.int64) * HALF + pair[None, :]
    cos = tl.load(cos_ptr + at, mask=turned, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + at, mask=turned, other=0.0).to(tl.float32)
    signed = tl.where(first[None, :], -sin, sin)
    return tl.fma(x, cos, y * signed)


@triton.jit
def load_queries(
    pointers,
    strides,
    request,
    head,
    position,
    stored,
    rotary_rows,
    valid,
    TILE: tl.constexpr,
    FLAGS: tl.constexpr,
):
    """Loads the queries of a tile [BLOCK_M, BLOCK_D], rotated if the call has tables.

    Args:
        pointers: DecodePointers of the launch.
        strides: DecodeStrides of the launch.
        request: Index of the request.
        head: Query head of each row, [BLOCK_M].
        position: Query position of each row, [BLOCK_M].
        stored: Tokens stored before the call, the position of query 0 for the rotation.
        rotary_rows: Number of rows of the tables.
        valid: Mask of the rows that exist, [BLOCK_M].
        TILE: DecodeShape of the launch.
        FLAGS: DecodeFlags of the launch.
    """
    columns = tl.arange(0, TILE.block_d)
    base = pointers.q + request.to(tl.int64) * strides.q_batch
    ptrs = base + position.to(tl.int64) * strides.q_token + head.to(tl.int64) * strides.q_head
    inside = valid[:, None] & (columns < TILE.head_dim)[None, :]
    if TILE.rotary == 0:
        return tl.load(ptrs[:, None] + columns[None, :], mask=inside, other=0.0)
    else:
        at = stored + position if FLAGS.rotates_each else stored + position * 0
        turned = rotated_rows(
            ptrs,
            columns,
            inside,
            pointers.cos,
            pointers.sin,
            at,
            rotary_rows,
            TILE.rotary,
            FLAGS.interleaved,
        )
        return turned.to(pointers.q.dtype.element_ty)


@triton.jit
def row_offsets(page, slot, local, page_stride, token_stride, SCATTERED: tl.constexpr):
    """Returns the offset of each key [BLOCK_N] int64 in a cache, from its page and slot.

    Args:
        page: Page of the keys: [BLOCK_N] if SCATTERED, else one number.
        slot: Place on the page: of each key [BLOCK_N] if SCATTERED, else of the first key.
        local: Index of each key in the tile, [BLOCK_N].
        page_stride: Stride of pages, in elements.
        token_stride: Stride of tokens, in elements.
        SCATTERED: Whether the keys may lie on several pages.
    """
    first = page.to(tl.int64) * page_stride + slot.to(tl.int64) * token_stride
    if SCATTERED:
        return first
    else:
        return first + local * token_stride


@triton.jit
def attend(
    q,
    m,
    l,
    acc,
    begin,
    end,
    pointers,
    strides,
    request,
    head_kv,
    leftpad,
    length,
    position,
    shift,
    left,
    right,
    scale,
    softcap,
    slope,
    multiplier,
    TILE: tl.constexpr,
    FLAGS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Updates the online softmax (m, l, acc) of a tile by the keys [begin, end).

    The arithmetic of a block of keys is that of varlen_fwd_kernel. `begin` is a multiple of
    BLOCK_N. Blocks that a row does not see leave its m, l and acc as they are.

    Args:
        q: Queries [BLOCK_M, BLOCK_D].
        m: Running maximum [BLOCK_M].
        l: Running sum [BLOCK_M].
        acc: Accumulator of the output [BLOCK_M, BLOCK_D].
        begin: First key position.
        end: Key position after the last one, at most `length`.
        pointers: DecodePointers of the launch.
        strides: DecodeStrides of the launch.
        request: Index of the request.
        head_kv: Key/value head.
        leftpad: Padding before the first key.
        length: Number of keys of the request.
        position: Query position of each row, [BLOCK_M].
        shift: Number of keys minus number of queries of the request.
        left: Visible keys before a query's own position, if FLAGS.has_left.
        right: Visible keys after a query's own position, if FLAGS.has_right.
        scale: softmax_scale, the factor of q.k.
        softcap: Softcap c.
        slope: ALiBi slopes, [BLOCK_M, 1], or 0.
        multiplier: Factor from logits_multiplier.
        TILE: DecodeShape of the launch.
        FLAGS: DecodeFlags of the launch.
        PRECISION: Precision of matrix products.
    """
    local = tl.arange(0, TILE.block_n)
    columns = tl.arange(0, TILE.block_d)
    head = head_kv.to(tl.int64)
    k_base = pointers.k + head * strides.k_head
    v_base = pointers.v + head * strides.v_head
    row = request
    if pointers.batch_index is not None:
        row = tl.load(pointers.batch_index + request)
    first_seen = position + shift - left
    last_seen = tl.minimum(position + shift + right, length - 1)
    for n in tl.range(begin, end, TILE.block_n):
        key = n + local
        if TILE.page == 0:
            page = row
            slot = leftpad + n
        else:
            table = pointers.block_table + request.to(tl.int64) * strides.block_table
            if TILE.scattered:
                index = leftpad + key
                page = tl.load(table + index // TILE.page, mask=key < length, other=0)
                slot = index % TILE.page
            else:
                page = tl.load(table + n // TILE.page)
                slot = n % TILE.page
        k_rows = row_offsets(page, slot, local, strides.k_page, strides.k_token, TILE.scattered)
        k = load_rows(
            k_base + k_rows[:, None] + columns[None, :],
            key,
            length,
            columns,
            TILE.head_dim,
            TILE.block_d,
            True,
        )
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        x = logits(
            s,
            position[:, None],
            key[None, :],
            shift,
            scale,
            softcap,
            slope,
            FLAGS.has_softcap,
            pointers.alibi_slopes is not None,
        )
        x = mask_logits(x, local[None, :], first_seen - n, last_seen - n, FLAGS.has_left, True)
        p, alpha, m, l = softmax_step(x, multiplier, m, l)
        acc = acc * alpha[:, None]
        v_rows = row_offsets(page, slot, local, strides.v_page, strides.v_token, TILE.scattered)
        v = load_rows(
            v_base + v_rows[:, None] + columns[None, :],
            key,
            length,
            columns,
            TILE.head_dim,
            TILE.block_d,
            True,
        )
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return m, l, acc


@triton.jit
def merge_step(m, l, acc, m_split, l_split, acc_split):
    """Merges the online softmax of one split into that of the splits before it.

    Explicit fused multiply-adds fix the roundings, so that every kernel merges to the same bits. A
    split without a visible key changes nothing.

    Args:
        m: Maximum of the base-2 logits so far, [M].
        l: Sum of the weights so far, [M].
        acc: Accumulator so far, [M, D].
        m_split: Maximum of the split, [M].
        l_split: Sum of the split, [M].
        acc_split: Accumulator of the split, [M, D].
    """
    m_new = tl.maximum(m, m_split)
    base = tl.where(m_new == float("-inf"), 0.0, m_new)
    old = tl.exp2(m - base)
    new = tl.exp2(m_split - base)
    l = tl.fma(l, old, l_split * new)
    acc = tl.fma(acc, tl.broadcast_to(old[:, None], acc.shape), acc_split * new[:, None])
    return m_new, l, acc
