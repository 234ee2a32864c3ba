"""Loads and stores tiles of rows, with zero padding."""

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
    """Loads a tile [M, BLOCK_D] of rows.

    Columns from HEAD_DIM on are zero. With BOUNDED, rows from `length` on are zero, too.
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
    """Stores a tile [M, BLOCK_D] in the pointer's dtype.

    Rows from `length` on and columns from HEAD_DIM on are not stored.
    """
    inside = (rows < length)[:, None]
    if BLOCK_D != HEAD_DIM:
        inside = inside & (columns < HEAD_DIM)[None, :]
    tl.store(ptrs, values.to(ptrs.dtype.element_ty), mask=inside)
