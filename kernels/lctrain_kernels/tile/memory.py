"""Loads and stores tiles of rows of one document, masked at its end and beyond the head dim."""

import triton
import triton.language as tl


@triton.jit
def load_rows(
    ptrs,
    rows,
    length,
    columns,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    """Loads a tile [M, BLOCK_D] of rows, with zeros in its padding.

    Args:
        ptrs: Addresses of the elements, [M, BLOCK_D].
        rows: Position of each row in the document, [M].
        length: Number of rows of the document.
        columns: Index of each column, [BLOCK_D].
        HEAD_DIM: Number of columns in memory; the others are padding.
        BLOCK_D: Number of columns of the tile.
        BOUNDED: Whether rows from `length` on are padding; False if the tile has none.
    """
    if BOUNDED:
        if BLOCK_D == HEAD_DIM:
            return tl.load(ptrs, mask=(rows < length)[:, None], other=0.0)
        else:
            inside = (rows < length)[:, None] & (columns < HEAD_DIM)[None, :]
            return tl.load(ptrs, mask=inside, other=0.0)
    else:
        if BLOCK_D == HEAD_DIM:
            return tl.load(ptrs)
        else:
            return tl.load(ptrs, mask=(columns < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def store_rows(ptrs, values, rows, length, columns, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Stores a tile [M, BLOCK_D] in the pointers' dtype, without its padding.

    Args:
        ptrs: Addresses of the elements, [M, BLOCK_D].
        values: Tile to store, [M, BLOCK_D].
        rows: Position of each row in the document, [M].
        length: Number of rows of the document; later rows are not stored.
        columns: Index of each column, [BLOCK_D].
        HEAD_DIM: Number of columns in memory; later columns are not stored.
        BLOCK_D: Number of columns of the tile.
    """
    inside = (rows < length)[:, None]
    if BLOCK_D != HEAD_DIM:
        inside = inside & (columns < HEAD_DIM)[None, :]
    tl.store(ptrs, values.to(ptrs.dtype.element_ty), mask=inside)
