"""Draws the random bits of dropout in the Hopper forward kernels.

The bits are those of tile/dropout.py, which the portable kernels use.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from lctrain_kernels.gluon.primitives import draw_bits, dropout_head, load_key, opaque
from lctrain_kernels.gluon.structures import DropoutKey


@gluon.jit
def dropout_key(
    pointers, first_head, document, head, first, local_query, HAS_DROPOUT: gl.constexpr
):
    """Returns the DropoutKey of a tile of queries: all inputs of the dropout RNG except the keys.

    Without dropout, nothing reads its fields.

    Args:
        pointers: Tensors of a call: dropout_seed [1] int64, document_ids and query_offsets [N]
            int32.
        first_head: Index of the call's first query head for the dropout RNG; None instead of 0.
        document: Index of the document in the pack.
        head: Index of each row's query head in the call.
        first: Position in the document of the tile's first query.
        local_query: Position of each row's query, relative to `first`.
        HAS_DROPOUT: Whether attention weights are dropped.
    """
    key_0 = 0
    key_1 = 0
    document_key = 0
    if HAS_DROPOUT:
        key_0, key_1, document_key, query_offset = load_key(
            pointers.dropout_seed, pointers.document_ids, pointers.query_offsets, document
        )
        head = dropout_head(head, first_head)
        first = first + query_offset
    return DropoutKey(key_0, key_1, document_key, head, first, local_query)


@gluon.jit
def branch_key(random, BRANCH: gl.constexpr):
    """Returns the DropoutKey of a branch of differential attention, 0 or 1.

    For the dropout RNG, branch b of head h has the head index 2 h + b.
    """
    head = 2 * random.head + BRANCH
    return DropoutKey(
        random.key_0, random.key_1, random.document, head, random.first, random.local_query
    )


@gluon.jit
def block_bits(
    random, block, BLOCK_N: gl.constexpr, s_layout: gl.constexpr, HAS_DROPOUT: gl.constexpr
):
    """Draws the random words of a block of attention weights, [rows, BLOCK_N] uint32.

    A weight uses only 16 bits of its 32-bit word, which `drop_weights` selects: keys that differ in
    bit 3 of their position share a word, and use different halves of it. Without dropout the result
    is 0. The drawing overlaps with the block's product q k^T, if the caller has started it.

    Args:
        random: DropoutKey of the rows.
        block: Index of the block of keys in the document.
        BLOCK_N: Number of keys of a block.
        s_layout: Layout of the scores.
        HAS_DROPOUT: Whether attention weights are dropped.
    """
    return bits_from_key(random, block * BLOCK_N, BLOCK_N, s_layout, HAS_DROPOUT)


@gluon.jit
def bits_from_key(
    random, key, BLOCK_N: gl.constexpr, s_layout: gl.constexpr, HAS_DROPOUT: gl.constexpr
):
    """Draws the random words of block_bits for the BLOCK_N keys from position `key` on.

    `key` is a multiple of 32. The other arguments are those of block_bits.
    """
    bits = 0
    if HAS_DROPOUT:
        local_key = gl.arange(0, BLOCK_N, gl.SliceLayout(0, s_layout))
        bits = draw_bits(
            random.key_0,
            random.key_1,
            random.document,
            random.head[:, None].to(gl.uint32),
            random.first,
            random.local_query[:, None],
            key,
            local_key[None, :],
        )
        bits = opaque(bits)
    return bits
