"""Triton kernel of linear layers whose bits of a row do not depend on the other rows."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_rows"])
def batch_invariant_linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    columns,
    width,
    stride_out,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Computes out = x @ weight.T + bias, summed in float32 in one order for every row.

    x [num_rows, width] and weight [columns, width] are contiguous; bias is [columns] or None; out
    [num_rows, columns] has the row stride stride_out. A program computes one tile of out, and sums
    over the width in blocks of BLOCK_K from the first one up. So a row's sum has one order, for any
    num_rows. EVEN_K says that BLOCK_K divides the width. GROUP tiles of rows that follow one
    another in the grid read one tile of the weight. The number of rows is not specialised: all
    numbers of rows share one binary per tile.

    Grid: (cdiv(num_rows, BLOCK_M) * cdiv(columns, BLOCK_N),).
    """
    row_tiles = tl.cdiv(num_rows, BLOCK_M)
    of_group = GROUP * tl.cdiv(columns, BLOCK_N)
    first = tl.program_id(0) // of_group * GROUP
    size = tl.minimum(row_tiles - first, GROUP)
    place = tl.program_id(0) % of_group
    rows = (first + place % size) * BLOCK_M + tl.arange(0, BLOCK_M)
    words = (place // size) * BLOCK_N + tl.arange(0, BLOCK_N)
    steps = tl.arange(0, BLOCK_K)
    # Rows and columns outside are computed from the first ones, and not stored.
    x_rows = tl.where(rows < num_rows, rows, 0).to(tl.int64)
    weight_rows = tl.where(words < columns, words, 0).to(tl.int64)
    x_ptrs = x_ptr + x_rows[:, None] * width + steps[None, :]
    weight_ptrs = weight_ptr + weight_rows[:, None] * width + steps[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, width, BLOCK_K, num_stages=STAGES):
        if EVEN_K:
            x = tl.load(x_ptrs)
            weight = tl.load(weight_ptrs)
        else:
            inside = (start + steps < width)[None, :]
            x = tl.load(x_ptrs, mask=inside, other=0.0)
            weight = tl.load(weight_ptrs, mask=inside, other=0.0)
        acc = tl.dot(x, tl.trans(weight), acc, input_precision=PRECISION)
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + words, mask=words < columns, other=0.0).to(tl.float32)[None, :]
    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * stride_out + words[None, :]
    mask = (rows < num_rows)[:, None] & (words < columns)[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)
