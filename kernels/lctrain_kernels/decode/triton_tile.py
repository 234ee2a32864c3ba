"""Device functions of the decode kernels: requests, rows of a tile, and their results.

A row of a tile is a query of one head. The rows of a request and a key/value head are numbered
position-major: row r is query position r // GROUP of query head r % GROUP of the group. So all
heads of a group read one tile of keys.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class DecodePointers(NamedTuple):
    """Pointers to the tensors of the attention kernels.

    partial and stats are the results of splits; work is the list of decode/plan.py. cu_seqlens_q is
    that of PackedQueries, and prefix that of SharedPrefixes. The other tensors are those of
    KVCache, NewTokens and DecodeOptions.
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
    cu_seqlens_q: Any
    prefix: Any
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
        prefetch: Whether page numbers are loaded one tile ahead.
        halves: Whether the grid's key/value heads are pairs of halves; see heads_of_tile.
    """

    head_dim: int
    block_d: int
    group: int
    block_m: int
    block_n: int
    page: int
    rotary: int
    scattered: bool
    prefetch: bool = False
    halves: bool = False


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
    "lse_stride",
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
def request_queries(cu_seqlens_q_ptr, request, seqlen_q):
    """Returns (index of a request's first query in q, number of its queries).

    Args:
        cu_seqlens_q_ptr: Cumulative numbers of queries, [B + 1] int32; None if all have seqlen_q.
        request: Index of the request.
        seqlen_q: Queries of a request, at most.
    """
    if cu_seqlens_q_ptr is None:
        return request.to(tl.int64) * seqlen_q, seqlen_q
    else:
        first = tl.load(cu_seqlens_q_ptr + request)
        return first.to(tl.int64), tl.load(cu_seqlens_q_ptr + request + 1) - first


@triton.jit
def shared_tokens(prefix_ptr, request):
    """Returns the number of a request's first keys that decode_prefix_kernel computes.

    Args:
        prefix_ptr: Numbers of tokens, [B] int32, or None.
        request: Index of the request; a tensor of indices works too.
    """
    if prefix_ptr is None:
        return request * 0
    else:
        return tl.load(prefix_ptr + request)


@triton.jit
def slot_range(low, high, prefix, split_size):
    """Returns the range (first, end) of slots that hold results of the keys [low, high).

    The splits of a shared prefix have the first slots. The splits of the other keys follow, counted
    from the end of the prefix.

    Args:
        low: First key position.
        high: Key position after the last one.
        prefix: Result of shared_tokens.
        split_size: Keys of a split.
    """
    shared = tl.cdiv(prefix, split_size)
    own = shared + (low - prefix) // split_size
    first = tl.where(low < prefix, low // split_size, own)
    own = shared + tl.cdiv(high - prefix, split_size)
    end = tl.where(high <= prefix, tl.cdiv(high, split_size), own)
    return first, end


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

    `low` is rounded down to a multiple of BLOCK_N. A tile without rows sees no key.

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
    high = tl.where(tile * TILE.block_m < seqlen_q * TILE.group, high, low)
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
    first,
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
        request: Index of the request, or of each row's request.
        first: Index of the request's first query, if pointers.cu_seqlens_q is given.
        head: Query head of each row, [BLOCK_M].
        position: Query position of each row, [BLOCK_M].
        stored: Tokens stored before the call, the position of query 0 for the rotation.
        rotary_rows: Number of rows of the tables.
        valid: Mask of the rows that exist, [BLOCK_M].
        TILE: DecodeShape of the launch.
        FLAGS: DecodeFlags of the launch.
    """
    columns = tl.arange(0, TILE.block_d)
    if pointers.cu_seqlens_q is None:
        base = pointers.q + request.to(tl.int64) * strides.q_batch
    else:
        base = pointers.q + first * strides.q_token
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
def store_result(
    pointers,
    out,
    lse,
    request,
    first,
    position,
    head,
    heads,
    lse_stride,
    valid,
    TILE: tl.constexpr,
):
    """Stores rows of out, [B, Sq, H, D] or [T, H, D], and of lse, [B, H, Sq] or [H, T].

    Args:
        pointers: Tuple with the pointers out, lse and cu_seqlens_q.
        out: Output [M, BLOCK_D].
        lse: Logarithm of the sum of exponentials, [M].
        request: Index of the request.
        first: Index of the request's first query among all queries.
        position: Query position of each row, [M].
        head: Query head of each row, [M].
        heads: Number of query heads H.
        lse_stride: Stride of heads in lse.
        valid: Mask of the rows that exist, [M].
        TILE: DecodeShape of the launch.
    """
    columns = tl.arange(0, TILE.block_d)
    place = (first + position) * heads + head
    inside = valid[:, None] & (columns < TILE.head_dim)[None, :]
    ptrs = pointers.out + place[:, None] * TILE.head_dim + columns[None, :]
    tl.store(ptrs, out.to(pointers.out.dtype.element_ty), mask=inside)
    begin = first
    if pointers.cu_seqlens_q is None:
        begin = request.to(tl.int64) * heads * lse_stride
    tl.store(pointers.lse + begin + head.to(tl.int64) * lse_stride + position, lse, mask=valid)
