"""The three ranges of keys of dual chunk attention, and the queries that see a key in each range.

A chunk has c = chunk_size - local_size positions. A query sees three ranges of keys:

    INTRA  the keys of its own chunk, at their true distance;
    SUCC   (successive chunk) the keys of the chunk before, with the query rotated by c. Only the
           first `succ_length` queries of a chunk have this range;
    INTER  all earlier keys, with the query at the inter position, a constant.

In keys, per query:

    INTER [0, inter_end)    SUCC [inter_end, chunk_begin)    INTRA [chunk_begin, position]

inter_end and chunk_begin never decrease with the position. So the first and the last query of a
tile bound the ranges of the whole tile, whichever chunks they are in.
"""

import triton
import triton.language as tl

INTER = tl.constexpr(0)
SUCC = tl.constexpr(1)
INTRA = tl.constexpr(2)


@triton.jit
def chunk_begin(position, c):
    """Returns the first position of the chunk of c tokens that holds `position`.

    For negative positions it returns 0.
    """
    return tl.maximum(position, 0) // c * c


@triton.jit
def inter_end(position, c, succ_length):
    """Returns the position after the last INTER key of the query at `position`.

    If the query has SUCC keys, this is the first of them. c is the number of tokens of a chunk,
    succ_length the number of queries at its start that have SUCC keys.
    """
    intra = chunk_begin(position, c)
    return tl.where(position - intra >= succ_length, intra, tl.maximum(intra - c, 0))


@triton.jit
def keys_of_query(position, relation, c, succ_length):
    """Returns the positions (first, last) of the keys that a query sees in one range.

    position is the query's position in the document, relation the range: INTER, SUCC or INTRA. The
    range is empty if first > last. c and succ_length are those of inter_end.
    """
    intra = chunk_begin(position, c)
    inter = inter_end(position, c, succ_length)
    first = tl.where(relation == INTER, 0, tl.where(relation == SUCC, inter, intra))
    last = tl.where(relation == INTER, inter - 1, tl.where(relation == SUCC, intra - 1, position))
    return first, last


@triton.jit
def keys_of_tile(
    first, last, relation, c, succ_length, BLOCK_N: tl.constexpr, ALIGNED: tl.constexpr
):
    """Returns the key positions (low, clear, high) that split a loop over the keys of one range.

    Blocks of BLOCK_N keys start at `low`. Every query of the tile sees all keys of the blocks in
    [low, clear). Blocks in [clear, high) need the mask of keys_of_query. The range is empty if
    low >= high.

    Args:
        first: Position of the tile's first query.
        last: Position of the tile's last query.
        relation: Range of keys: INTER, SUCC or INTRA.
        c: Number of tokens of a chunk.
        succ_length: Number of queries at the start of a chunk that have SUCC keys.
        BLOCK_N: Number of keys of a block.
        ALIGNED: Whether to round `low` down to a multiple of 32, where a draw of the dropout mask
            begins.
    """
    low, _ = keys_of_query(first, relation, c, succ_length)
    intra = chunk_begin(last, c)
    one_chunk = chunk_begin(first, c) == intra
    # Some query has SUCC keys if the first one has, or if a chunk begins inside the tile.
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
    """Returns the positions (first, last) of the queries that see the key in one range.

    The key is at position `key`; relation is the range: INTER, SUCC or INTRA. The result is empty
    if first > last. length_k is the number of keys of the document; c and succ_length are those of
    inter_end.
    """
    end = chunk_begin(key, c) + c
    first = tl.where(relation == INTRA, key, tl.where(relation == SUCC, end, end + succ_length))
    last = tl.where(
        relation == INTRA, end - 1, tl.where(relation == SUCC, end + succ_length - 1, length_k - 1)
    )
    return first, last


@triton.jit
def queries_of_tile(first, last, relation, c, succ_length, length_k):
    """Returns the query positions (low, clear_low, clear_high, high) for the keys [first, last].

    Queries in [low, high) see at least one of the keys in one range. Queries in
    [clear_low, clear_high) see all of them, and so need no mask. first and last are positions; the
    other arguments are those of queries_of_key.
    """
    low, clear_high = queries_of_key(first, relation, c, succ_length, length_k)
    clear_low, high = queries_of_key(last, relation, c, succ_length, length_k)
    return low, clear_low, clear_high + 1, tl.minimum(high + 1, length_k)


@triton.jit
def inter_delta(position, c, inter_position):
    """Returns by how many positions RoPE must rotate a query to be at inter_position, float32.

    q is passed already rotated by its position in its chunk of c tokens, which is subtracted.
    """
    return (inter_position - (position - chunk_begin(position, c))).to(tl.float32)
