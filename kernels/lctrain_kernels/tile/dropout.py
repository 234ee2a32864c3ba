"""Draws the dropout mask of a tile of attention weights with Philox-4x32-7.

Seed, document id, query head and positions decide a weight's mask, not the size of tiles. One
Philox draw gives the bits of eight weights. reference/philox.py defines the mask in PyTorch.
"""

import triton
import triton.language as tl

_MULTIPLIER_0 = tl.constexpr(0xD2511F53)
_MULTIPLIER_1 = tl.constexpr(0xCD9E8D57)
_WEYL_0 = tl.constexpr(0x9E3779B9)
_WEYL_1 = tl.constexpr(0xBB67AE85)
_ROUNDS = tl.constexpr(7)


@triton.jit
def load_key(seed_ptr, document_ids_ptr, query_offsets_ptr, document):
    """Loads the inputs of the dropout RNG that a document's weights share.

    Args:
        seed_ptr: Seed, [1] int64.
        document_ids_ptr: Ids of the documents, [N] int32; None takes the index in the pack.
        query_offsets_ptr: Position within its document of the first query that this rank holds,
            [N] int32; None takes 0.
        document: Index of the document in the pack.

    Returns:
        (low half of the seed, high half of the seed, document id), all uint32, and the document's
        query offset, int32.
    """
    seed = tl.load(seed_ptr).to(tl.uint64, bitcast=True)
    query_offset = 0
    if query_offsets_ptr is not None:
        query_offset = tl.load(query_offsets_ptr + document)
    if document_ids_ptr is not None:
        document = tl.load(document_ids_ptr + document)
    low = (seed & 0xFFFFFFFF).to(tl.uint32)
    high = (seed >> 32).to(tl.uint32)
    return low, high, document.to(tl.uint32, bitcast=True), query_offset


@triton.jit
def dropout_head(head, first_head):
    """Returns the index of a query head for the dropout RNG: head + first_head.

    Args:
        head: Index of the query head in the call.
        first_head: Index of the call's first query head among the heads of all calls that share a
            seed; None instead of 0.
    """
    if first_head is not None:
        head = head + first_head
    return head


@triton.jit
def draw_bits(key_0, key_1, document, head, first_query, query, first_key, key):
    """Returns a random 32-bit word for every weight of a tile, [M, N] or transposed.

    A weight uses 16 bits of its word, which keep_mask selects. Keys that differ in bit 3 of their
    position share a word: one uses its upper half, the other its lower half.

    A position is split into that of the tile and that inside the tile. The compiler knows the
    second for each register, so choosing one of Philox's four words costs no instruction.
    The products of Philox's first two rounds are vectors: each depends on the queries or on the
    keys only.

    Args:
        key_0: Low half of the seed, uint32.
        key_1: High half of the seed, uint32.
        document: Document id, uint32.
        head: Index of the query head that dropout_head returned, uint32, scalar or broadcastable.
        first_query: Position of the tile's first query in the document, plus the document's query
            offset; a multiple of 16.
        query: Positions of queries inside the tile, int32, broadcastable ([M, 1] or [1, M]).
        first_key: Position of the tile's first key in the document, a multiple of 32.
        key: Positions of keys inside the tile, int32, broadcastable ([1, N] or [N, 1]).
    """
    c1 = ((query >> 4) * 8 + (query & 7) + first_query // 2).to(tl.uint32)
    c0 = ((key >> 5) * 8 + (key & 7) + first_key // 4).to(tl.uint32)
    c2 = head
    c3 = document
    for _ in tl.static_range(_ROUNDS):
        # A widening product gives both halves in one instruction; umulhi and a product take two.
        product_0 = c0.to(tl.uint64) * _MULTIPLIER_0
        product_1 = c2.to(tl.uint64) * _MULTIPLIER_1
        c0 = (product_1 >> 32).to(tl.uint32) ^ c1 ^ key_0
        c2 = (product_0 >> 32).to(tl.uint32) ^ c3 ^ key_1
        c1 = product_1.to(tl.uint32)
        c3 = product_0.to(tl.uint32)
        key_0 = key_0 + _WEYL_0
        key_1 = key_1 + _WEYL_1
    late_query = (query & 8) != 0
    late_key = (key & 16) != 0
    return tl.where(late_query, tl.where(late_key, c3, c2), tl.where(late_key, c1, c0))


@triton.jit
def top_bits(bits, key):
    """Returns 32-bit words whose upper half holds the 16 random bits of an attention weight.

    Args:
        bits: Words that draw_bits returned, one of 32 bits for each attention weight. Keys whose
            position has bit 3 set use the upper half, the others the lower half.
        key: Positions of keys inside the tile, as in draw_bits.
    """
    return tl.where((key & 8) != 0, bits, bits << 16)


@triton.jit
def is_kept(bits, key, threshold):
    """Returns the dropout mask from random words: True where a weight is kept.

    Args:
        bits: Words that draw_bits returned, one of 32 bits for each attention weight.
        key: Positions of keys inside the tile, as in draw_bits.
        threshold: A weight is dropped if its 16 random bits are below this number.
    """
    # Compared in the upper half of the word, so that bits from the upper half need no shift.
    return top_bits(bits, key) >= threshold.to(tl.uint32) << 16


@triton.jit
def keep_mask(key_0, key_1, document, head, first_query, query, first_key, key, threshold):
    """Draws the dropout mask of a tile of weights: True where a weight is kept.

    The arguments are those of draw_bits and of is_kept.
    """
    bits = draw_bits(key_0, key_1, document, head, first_query, query, first_key, key)
    return is_kept(bits, key, threshold)
