"""Tiles of rows between global memory and registers."""

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
    """Loads [M, BLOCK_D]; zero beyond HEAD_DIM and, where BOUNDED, beyond row `length`."""
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
    """Stores [M, BLOCK_D] in the pointer's dtype, without what lies beyond `length` or HEAD_DIM."""
    inside = (rows < length)[:, None]
    if BLOCK_D != HEAD_DIM:
        inside = inside & (columns < HEAD_DIM)[None, :]
    tl.store(ptrs, values.to(ptrs.dtype.element_ty), mask=inside)
