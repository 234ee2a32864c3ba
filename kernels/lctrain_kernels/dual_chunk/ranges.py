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

INTER = tl.constexpr(0)
SUCC = tl.constexpr(1)
INTRA = tl.constexpr(2)


@triton.jit
def chunk_begin(position, c):
    """The first position of the chunk; 0 before the first key."""
    return tl.maximum(position, 0) // c * c


@triton.jit
def inter_end(position, c, succ_length):
    """The end of the keys that the query at `position` meets at the far position."""
    intra = chunk_begin(position, c)
    return tl.where(position - intra >= succ_length, intra, tl.maximum(intra - c, 0))


@triton.jit
def keys_of_query(position, relation, c, succ_length):
    """Returns (first, last) of the keys that the query at `position` meets in one way."""
    intra = chunk_begin(position, c)
    inter = inter_end(position, c, succ_length)
    first = tl.where(relation == INTER, 0, tl.where(relation == SUCC, inter, intra))
    last = tl.where(relation == INTER, inter - 1, tl.where(relation == SUCC, intra - 1, position))
    return first, last


@triton.jit
def keys_of_tile(
    first, last, relation, c, succ_length, BLOCK_N: tl.constexpr, ALIGNED: tl.constexpr
):
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
    low, _ = keys_of_query(first, relation, c, succ_length)
    intra = chunk_begin(last, c)
    one_chunk = chunk_begin(first, c) == intra
    # Some query is near if the first one is, or if another chunk begins inside the tile.
    some_succ = (succ_length > 0) & ((first - intra < succ_length) | (first < intra))
    high = tl.where(relation == SUCC, tl.where(some_succ, intra, low), last + 1)
    high = tl.where(relation == INTER, inter_end(last, c, succ_length), high)
    all_see = tl.where(
        relation == SUCC, tl.where(last - intra < succ_length, intra, low), first + 1
    )
    all_see = tl.where(
        relation == INTER, inter_end(first, c, succ_length), tl.where(one_chunk, all_see, low)
    )
    if ALIGNED:
        aligned = low // 32 * 32
        all_see = tl.where(aligned < low, aligned, all_see)
        low = aligned
    return low, low + tl.maximum(all_see - low, 0) // BLOCK_N * BLOCK_N, high


@triton.jit
def queries_of_key(key, relation, c, succ_length, length_k):
    """Returns (first, last) of the positions of queries that meet the key in one way."""
    end = chunk_begin(key, c) + c
    first = tl.where(relation == INTRA, key, tl.where(relation == SUCC, end, end + succ_length))
    last = tl.where(
        relation == INTRA, end - 1, tl.where(relation == SUCC, end + succ_length - 1, length_k - 1)
    )
    return first, last


@triton.jit
def queries_of_tile(first, last, relation, c, succ_length, length_k):
    """Returns (low, clear_low, clear_high, high) in positions, for the keys first to last.

    Queries in [low, high) meet some key of the tile; those in [clear_low, clear_high) meet all.
    """
    low, clear_high = queries_of_key(first, relation, c, succ_length, length_k)
    clear_low, high = queries_of_key(last, relation, c, succ_length, length_k)
    return low, clear_low, clear_high + 1, tl.minimum(high + 1, length_k)


@triton.jit
def inter_delta(position, c, inter_position):
    """How far the query at `position` is rotated to stand at the far position, float32."""
    return (inter_position - (position - chunk_begin(position, c))).to(tl.float32)
