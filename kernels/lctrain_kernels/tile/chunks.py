"""Dual chunk attention's geometry: which keys a query meets in which way.

A chunk is c = chunk_size - local_size positions. A query at place r of its chunk meets the keys of
its chunk where it stands (OWN). The keys before it meets at the far position (FAR), but for those
of the chunk before if r < near: them it meets rotated by c (NEAR). In keys, per query:

    FAR [0, far_end)    NEAR [far_end, own_begin)    OWN [own_begin, position]

far_end and own_begin never fall as positions rise, so the first and the last query of a tile bound
all of it, in whichever chunks they lie.
"""

import triton
import triton.language as tl

FAR = tl.constexpr(0)
NEAR = tl.constexpr(1)
OWN = tl.constexpr(2)


@triton.jit
def own_begin(position, c):
    """The first position of the chunk; 0 before the first key."""
    return tl.maximum(position, 0) // c * c


@triton.jit
def far_end(position, c, near):
    """The end of the keys that the query at `position` meets at the far position."""
    own = own_begin(position, c)
    return tl.where(position - own >= near, own, tl.maximum(own - c, 0))


@triton.jit
def keys_of_query(position, way, c, near):
    """Returns (first, last) of the keys that the query at `position` meets in one way."""
    own = own_begin(position, c)
    far = far_end(position, c, near)
    first = tl.where(way == FAR, 0, tl.where(way == NEAR, far, own))
    last = tl.where(way == FAR, far - 1, tl.where(way == NEAR, own - 1, position))
    return first, last


@triton.jit
def keys_of_tile(first, last, way, c, near, BLOCK_N: tl.constexpr, ALIGNED: tl.constexpr):
    """Returns (low, clear, high) for the queries at positions first to last.

    Tiles of keys start at `low`. Those before `clear` are visible to every query; those in [clear,
    high) need the mask of keys_of_query. Empty where low >= high.

    Args:
        first: Position of the tile's first query.
        last: Of its last query.
        way: FAR, NEAR or OWN.
        c: Tokens of a chunk.
        near: As above.
        BLOCK_N: Keys of a tile.
        ALIGNED: Lower `low` to a multiple of 32, where a draw of the dropout mask begins.
    """
    low, _ = keys_of_query(first, way, c, near)
    own = own_begin(last, c)
    one_chunk = own_begin(first, c) == own
    # Some query is near if the first one is, or if another chunk begins inside the tile.
    some_near = (near > 0) & ((first - own < near) | (first < own))
    high = tl.where(way == NEAR, tl.where(some_near, own, low), last + 1)
    high = tl.where(way == FAR, far_end(last, c, near), high)
    all_see = tl.where(way == NEAR, tl.where(last - own < near, own, low), first + 1)
    all_see = tl.where(way == FAR, far_end(first, c, near), tl.where(one_chunk, all_see, low))
    if ALIGNED:
        aligned = low // 32 * 32
        all_see = tl.where(aligned < low, aligned, all_see)
        low = aligned
    return low, low + tl.maximum(all_see - low, 0) // BLOCK_N * BLOCK_N, high


@triton.jit
def queries_of_key(key, way, c, near, length_k):
    """Returns (first, last) of the positions of queries that meet the key in one way."""
    end = own_begin(key, c) + c
    first = tl.where(way == OWN, key, tl.where(way == NEAR, end, end + near))
    last = tl.where(way == OWN, end - 1, tl.where(way == NEAR, end + near - 1, length_k - 1))
    return first, last


@triton.jit
def queries_of_tile(first, last, way, c, near, length_k):
    """Returns (low, clear_low, clear_high, high) in positions, for the keys first to last.

    Queries in [low, high) meet some key of the tile; those in [clear_low, clear_high) meet all.
    """
    low, clear_high = queries_of_key(first, way, c, near, length_k)
    clear_low, high = queries_of_key(last, way, c, near, length_k)
    return low, clear_low, clear_high + 1, tl.minimum(high + 1, length_k)


@triton.jit
def far_delta(position, c, far_position):
    """How far the query at `position` is rotated to stand at the far position, float32."""
    return (far_position - (position - own_begin(position, c))).to(tl.float32)
