"""Triton kernels of RMSNorm and LayerNorm, with or without the residual addition before the norm.

A program of the forward holds ROWS whole rows in registers. The backward has a persistent grid:
each program loops over groups of rows, sums its part of the weight's gradient in registers and
writes it once; `column_sum_kernel` adds the parts. There are no atomics, so every run gives the
same bits.
"""

import triton
import triton.language as tl


@triton.jit
def _load_rows(ptr, rows, stride, columns, mask):
    return tl.load(ptr + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _weight(weight_ptr, columns, inside, offset):
    return tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32) + offset


@triton.jit(do_not_specialize=["num_rows"])
def norm_fwd_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    sum_ptr,
    mean_ptr,
    rstd_ptr,
    num_rows,
    stride_x,
    stride_residual,
    eps,
    offset,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    CENTERED: tl.constexpr,
    FLOAT32_PRODUCT: tl.constexpr,
):
    """Normalises ROWS rows of x [rows, COLUMNS], or of x + residual, per program.

    - x and residual have any row stride; y (normalised) and sum (x + residual) are contiguous.
    - weight and bias [COLUMNS]; `offset` is added to the weight. bias may be None.
    - mean and rstd [rows] float32 are written, mean only with CENTERED. rstd is 1 / standard
      deviation with CENTERED, else 1 / root mean square, with eps under the root.

    Without a residual (None), sum is not written. Grid: (cdiv(rows, ROWS),).

    BLOCK is the smallest power of two >= COLUMNS. CENTERED subtracts the mean (LayerNorm, not
    RMSNorm). With FLOAT32_PRODUCT, the normalised row is multiplied by the weight before it is
    rounded; without, it is rounded first.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = columns < COLUMNS
    mask = (rows < num_rows)[:, None] & inside[None, :]
    x = _load_rows(x_ptr, rows, stride_x, columns, mask)
    dtype = x.dtype
    x = x.to(tl.float32)
    if residual_ptr is not None:
        x += _load_rows(residual_ptr, rows, stride_residual, columns, mask).to(tl.float32)
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + rows[:, None] * COLUMNS + columns[None, :], rounded, mask=mask)
        dtype = rounded.dtype
        x = rounded.to(tl.float32)
    if CENTERED:
        mean = tl.sum(x, axis=1) / COLUMNS
        tl.store(mean_ptr + rows, mean, mask=rows < num_rows)
        x = tl.where(mask, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / COLUMNS + eps)
    tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)
    normalised = x * rstd[:, None]
    if not FLOAT32_PRODUCT:
        normalised = normalised.to(dtype).to(tl.float32)
    y = normalised * _weight(weight_ptr, columns, inside, offset)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + rows[:, None] * COLUMNS + columns[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def norm_bwd_kernel(
    dy_ptr,
    dsum_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dweight_ptr,
    dbias_ptr,
    num_rows,
    stride_dy,
    stride_dsum,
    stride_x,
    offset,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    CENTERED: tl.constexpr,
):
    """Computes dx, and each program's partial sums of dweight and dbias.

    Each program loops over groups of ROWS rows.

    - dy is the gradient of y. dsum is the gradient of the sum x + residual, which is added to dx,
      or None. x is the input of the norm: the sum, if there is a residual. All are [rows, COLUMNS]
      with any row stride.
    - mean and rstd [rows] float32 come from norm_fwd_kernel; weight is [COLUMNS].
    - dx [rows, COLUMNS] is contiguous.
    - dweight and dbias [programs, COLUMNS] float32 hold one partial sum per program. dbias may be
      None.

    Grid: any number of programs. `offset`, BLOCK and CENTERED are those of norm_fwd_kernel; STAGES
    is the depth of the load pipeline.
    """
    columns = tl.arange(0, BLOCK)
    inside = columns < COLUMNS
    weight = _weight(weight_ptr, columns, inside, offset)[None, :]
    dweight = tl.zeros([BLOCK], tl.float32)
    dbias = tl.zeros([BLOCK], tl.float32)
    first = tl.program_id(0) * ROWS
    step = tl.num_programs(0) * ROWS
    for start in tl.range(first, num_rows, step, num_stages=STAGES):
        rows = start + tl.arange(0, ROWS).to(tl.int64)
        valid = rows < num_rows
        mask = valid[:, None] & inside[None, :]
        x = _load_rows(x_ptr, rows, stride_x, columns, mask).to(tl.float32)
        dy = _load_rows(dy_ptr, rows, stride_dy, columns, mask).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows, mask=valid, other=0.0)[:, None]
        if CENTERED:
            mean = tl.load(mean_ptr + rows, mask=valid, other=0.0)
            x = tl.where(mask, x - mean[:, None], 0.0)
        normalised = x * rstd
        dweight += tl.sum(dy * normalised, axis=0)
        weighted = dy * weight
        correction = normalised * (tl.sum(weighted * normalised, axis=1) / COLUMNS)[:, None]
        if CENTERED:
            dbias += tl.sum(dy, axis=0)
            correction += (tl.sum(weighted, axis=1) / COLUMNS)[:, None]
        dx = (weighted - correction) * rstd
        if dsum_ptr is not None:
            dx += _load_rows(dsum_ptr, rows, stride_dsum, columns, mask).to(tl.float32)
        dx_ptrs = dx_ptr + rows[:, None] * COLUMNS + columns[None, :]
        tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    part = tl.program_id(0) * COLUMNS + columns
    tl.store(dweight_ptr + part, dweight, mask=inside)
    if CENTERED and dbias_ptr is not None:
        tl.store(dbias_ptr + part, dbias, mask=inside)


@triton.jit(do_not_specialize=["num_parts"])
def column_sum_kernel(
    parts_ptr,
    out_ptr,
    second_ptr,
    num_parts,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Stores the sums of the rows of parts [groups, num_parts, COLUMNS] float32, each [COLUMNS].

    The sum of the first group goes to out, and that of the second to second, which is None if there
    is one group. A program sums BLOCK columns of a group, and loads PARTS rows at a time. Grid:
    (cdiv(COLUMNS, BLOCK), groups).
    """
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    group = tl.program_id(1)
    parts_ptr += group * num_parts * COLUMNS
    total = tl.zeros([PARTS, BLOCK], tl.float32)
    for start in range(0, num_parts, PARTS):
        parts = start + tl.arange(0, PARTS)
        mask = (parts < num_parts)[:, None] & (columns < COLUMNS)[None, :]
        total += tl.load(
            parts_ptr + parts[:, None] * COLUMNS + columns[None, :], mask=mask, other=0.0
        )
    out = tl.sum(total, axis=0).to(out_ptr.dtype.element_ty)
    if group == 0:
        tl.store(out_ptr + columns, out, mask=columns < COLUMNS)
    elif second_ptr is not None:
        tl.store(second_ptr + columns, out, mask=columns < COLUMNS)
