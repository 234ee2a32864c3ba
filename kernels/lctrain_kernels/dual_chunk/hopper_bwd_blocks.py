"""Blocks of queries that see a tile of keys in one range, for the Hopper backward of dual chunk."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from lctrain_kernels.dual_chunk.hopper_ranges import chunk_begin, queries_of_tile
from lctrain_kernels.dual_chunk.hopper_structures import QueryRun
from lctrain_kernels.dual_chunk.ranges import INTER, SUCC

_SLAB_ROWS = gl.constexpr(16)


@gluon.jit
def _range_of_relation(
    first,
    last,
    chunk_length,
    succ_length,
    length_q,
    length_k,
    RELATION: gl.constexpr,
    BLOCK_M: gl.constexpr,
):
    """Returns (first query of the blocks that see keys [first, last], number of query blocks).

    The first query is a multiple of 16, as a slab of the float32 dq is, so up to 15 queries before
    those of the range are masked. If no query sees the keys, there is no block: those before the
    range may not have been rotated, and zero times what lies there may be NaN.
    """
    low, _, _, high = queries_of_tile(first, last, RELATION, chunk_length, succ_length, length_k)
    shift = length_k - length_q
    low = gl.maximum(low - shift, 0)
    high = gl.minimum(high - shift, length_q)
    begin = low // _SLAB_ROWS * _SLAB_ROWS
    return begin, (gl.where(low < high, high - begin, 0) + BLOCK_M - 1) // BLOCK_M


@gluon.jit
def blocks_of_relation(
    first,
    last,
    chunk_length,
    succ_length,
    length_q,
    length_k,
    RELATION: gl.constexpr,
    BLOCK_M: gl.constexpr,
):
    """Returns (QueryRun of the queries that see keys [first, last] in a range, its block count)."""
    low, blocks = _range_of_relation(
        first, last, chunk_length, succ_length, length_q, length_k, RELATION, BLOCK_M
    )
    first_after_gap = blocks
    gap = 0
    if RELATION == SUCC:
        # Keys of two chunks have two separate runs of SUCC queries.
        _, blocks_1 = _range_of_relation(
            first, first, chunk_length, succ_length, length_q, length_k, RELATION, BLOCK_M
        )
        low_2, blocks_2 = _range_of_relation(
            last, last, chunk_length, succ_length, length_q, length_k, RELATION, BLOCK_M
        )
        between = low_2 - (low + blocks_1 * BLOCK_M)
        chunks = chunk_begin(last, chunk_length) - chunk_begin(first, chunk_length)
        apart = (chunks == chunk_length) & (between >= 0)
        first_after_gap = gl.where(apart, blocks_1, blocks)
        gap = gl.where(apart, between, 0)
        blocks = gl.where(apart, blocks_1 + blocks_2, blocks)
    return QueryRun(low, first_after_gap, gap), blocks


@gluon.jit
def first_query(block, run, RELATION: gl.constexpr, BLOCK_M: gl.constexpr):
    """Returns the position in the document of the first query of block number `block` of a run.

    Blocks are consecutive, except for the gap of SUCC before block run.first_after_gap.
    """
    query = run.low + block * BLOCK_M
    if RELATION == SUCC:
        query += gl.where(block < run.first_after_gap, 0, run.gap)
    return query


@gluon.jit
def clear_blocks(
    first_key,
    keys: gl.constexpr,
    tile,
    chunk_length,
    succ_length,
    RELATION: gl.constexpr,
    BLOCK_M: gl.constexpr,
):
    """Returns (begin, end): query blocks [begin, end) see keys [first_key, first_key + keys)."""
    last_key = gl.minimum(first_key + keys, tile.end) - 1
    _, clear_low, clear_high, _ = queries_of_tile(
        first_key, last_key, RELATION, chunk_length, succ_length, tile.length_k
    )
    before = tile.length_k - tile.length_q + tile.run.low
    begin = gl.maximum(clear_low - before + BLOCK_M - 1, 0) // BLOCK_M
    clear_end = tile.blocks
    if RELATION != INTER:
        clear_end = gl.minimum(
            gl.maximum(clear_high - before, 0) // BLOCK_M, tile.run.first_after_gap
        )
    return gl.where(first_key + keys > tile.end, tile.blocks, begin), clear_end
