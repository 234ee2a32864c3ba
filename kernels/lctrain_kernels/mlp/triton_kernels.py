"""Triton kernels of SwiGLU, GeGLU and bias + GELU, forward and backward."""

import triton
import triton.language as tl

from lctrain_kernels.tile.divide import divide

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.693359375)  # log(2) in 10 bits: its products with whole numbers are exact
_LN_2_REST = tl.constexpr(-2.121944400547138e-4)  # log(2) minus these 10 bits
SILU = tl.constexpr(0)
GELU_TANH = tl.constexpr(1)
GELU = tl.constexpr(2)


@triton.jit
def _exp(x, dtype: tl.constexpr):
    """Returns exp(x) in float32 for x up to 88.

    For float32 data the result is accurate enough for the error bound of the tests; otherwise the
    faster approximation of the hardware is used. `dtype` is the dtype of the data.
    """
    x = tl.maximum(x, -110.0)  # exp(-110) is 0; -inf would give nan below
    if dtype == tl.float32:
        # tl.exp2(x * log2(e)) costs |x| roundings in the product and two in the GPU's exp2. So
        # exp(x) = 2^whole exp(part) with |part| <= log(2) / 2, and exp(part) is a polynomial.
        whole = tl.floor(x * _LOG2_E + 0.5)
        part = (x - whole * _LN_2) - whole * _LN_2_REST
        result = 1.0 + part * _exp_slope(part)
        half = tl.floor(0.5 * whole)  # 2^whole itself may be no normal number
        result = (result * _power_of_two(half)) * _power_of_two(whole - half)
    else:
        result = tl.exp2(x * _LOG2_E)
    return result


@triton.jit
def _exp_slope(x):
    """Returns (exp(x) - 1) / x for |x| <= log(2) / 2: Taylor's polynomial, within 6e-9."""
    slope = x * (1.0 / 5040.0) + (1.0 / 720.0)
    slope = x * slope + (1.0 / 120.0)
    slope = x * slope + (1.0 / 24.0)
    slope = x * slope + (1.0 / 6.0)
    slope = x * slope + 0.5
    return x * slope + 1.0


@triton.jit
def _power_of_two(exponent):
    """Returns 2^exponent for whole exponents from -126 to 127."""
    return ((exponent.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _sigmoid(x, DTYPE: tl.constexpr):
    """Returns sigmoid(x) and sigmoid(-x), accurate enough for data of DTYPE.

    sigmoid(-x) is not computed as 1 - sigmoid(x), which would lose digits by cancellation.
    """
    e = _exp(tl.minimum(-x, 69.0), DTYPE)  # about 1e30 at most: e * share stays finite
    share = divide(1.0, 1.0 + e, DTYPE)
    return share, e * share


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr):
    """Returns activation(x) and its derivative in float32, accurate enough for data of DTYPE.

    ACTIVATION is SILU, GELU_TANH (GELU by tanh) or GELU (exact).
    """
    if ACTIVATION == SILU:
        share, rest = _sigmoid(x, DTYPE)
        return x * share, share * (1.0 + x * rest)
    elif ACTIVATION == GELU_TANH:
        # gelu(x) = x sigmoid(2 u) with u = sqrt(2 / pi) (x + 0.044715 x^3)
        square = x * x
        u = x * (1.5957691216057308 + 0.07135481627260025 * square)
        share, rest = _sigmoid(u, DTYPE)
        slope = 1.5957691216057308 + 0.21406444881780076 * square
        return x * share, share * (1.0 + x * slope * rest)
    else:
        share = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        density = 0.3989422804014327 * _exp(-0.5 * x * x, DTYPE)
        return x * share, share + x * density


@triton.jit
def _place(columns, BLOCK: tl.constexpr):
    """Returns (row index, column indices [BLOCK]) of this program.

    The grid is (rows * cdiv(columns, BLOCK),).
    """
    blocks = tl.cdiv(columns, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    return row, (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def gated_fwd_kernel(
    gate_ptr,
    up_ptr,
    out_ptr,
    columns,
    stride_gate,
    stride_up,
    stride_out,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Computes out = activation(gate) * up, each [rows, columns].

    activation(gate) is rounded to gate's dtype first. Each tensor has a row stride of its own,
    stride_gate, stride_up or stride_out, and column stride 1. ACTIVATION is an argument of
    `activate`. A program computes BLOCK columns of a row. Grid: (rows * cdiv(columns, BLOCK),).
    """
    row, offsets = _place(columns, BLOCK)
    mask = offsets < columns
    gate = tl.load(gate_ptr + row * stride_gate + offsets, mask=mask, other=0.0)
    up = tl.load(up_ptr + row * stride_up + offsets, mask=mask, other=0.0)
    active, _ = activate(gate.to(tl.float32), ACTIVATION, gate.dtype)
    out = active.to(gate.dtype).to(tl.float32) * up.to(tl.float32)
    tl.store(out_ptr + row * stride_out + offsets, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gated_bwd_kernel(
    dout_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    out_ptr,
    columns,
    stride_dout,
    stride_gate,
    stride_up,
    stride_dgate,
    stride_dup,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Computes the gradients of gate and up from dout, each [rows, columns].

    dgate = dout * up * activation'(gate), dup = dout * activation(gate). If out_ptr is given,
    activation(gate) * up is computed again and stored there, with dout's row stride; out may be
    dout itself. Each of the other tensors has a row stride of its own; column strides are 1.
    ACTIVATION is an argument of `activate`. Grid: (rows * cdiv(columns, BLOCK),).
    """
    row, offsets = _place(columns, BLOCK)
    mask = offsets < columns
    dout = tl.load(dout_ptr + row * stride_dout + offsets, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * stride_gate + offsets, mask=mask, other=0.0)
    up = tl.load(up_ptr + row * stride_up + offsets, mask=mask, other=0.0).to(tl.float32)
    active, slope = activate(gate.to(tl.float32), ACTIVATION, gate.dtype)
    dgate = (dout * up * slope).to(dgate_ptr.dtype.element_ty)
    dup = (dout * active).to(dup_ptr.dtype.element_ty)
    tl.store(dgate_ptr + row * stride_dgate + offsets, dgate, mask=mask)
    tl.store(dup_ptr + row * stride_dup + offsets, dup, mask=mask)
    if out_ptr is not None:
        out = active.to(gate.dtype).to(tl.float32) * up
        tl.store(out_ptr + row * stride_dout + offsets, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def bias_gelu_fwd_kernel(
    x_ptr, bias_ptr, out_ptr, columns, stride_x, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr
):
    """Computes out = activation(x + bias), [rows, columns], for GELU activations.

    x has any row stride, out is contiguous; bias is [columns], or None. ACTIVATION is an argument
    of `activate`. A program computes BLOCK columns of a row. Grid: (rows * cdiv(columns, BLOCK),).
    """
    row, offsets = _place(columns, BLOCK)
    mask = offsets < columns
    x = tl.load(x_ptr + row * stride_x + offsets, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    active, _ = activate(x, ACTIVATION, x_ptr.dtype.element_ty)
    tl.store(out_ptr + row * columns + offsets, active.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def bias_gelu_bwd_kernel(
    dout_ptr,
    x_ptr,
    bias_ptr,
    dx_ptr,
    dbias_ptr,
    num_rows,
    columns,
    stride_dout,
    stride_x,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Computes the gradients of bias_gelu_fwd_kernel: dx, and partial sums of dbias.

    - dx = dout * activation'(x + bias). dout and x [rows, columns] have any row stride; dx is
      contiguous.
    - dbias [parts, columns] float32, or None without a bias.

    Grid: (parts, cdiv(columns, BLOCK)). Program p of a block of BLOCK columns processes the groups
    of ROWS rows with index p, p + parts, ... and stores its sum of dx in row p of dbias. ACTIVATION
    is an argument of `activate`.
    """
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < columns
    bias = tl.zeros([BLOCK], tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    dbias = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(
        tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS, num_stages=1
    ):
        rows = start + tl.arange(0, ROWS).to(tl.int64)
        mask = (rows < num_rows)[:, None] & inside[None, :]
        dout = tl.load(
            dout_ptr + rows[:, None] * stride_dout + offsets[None, :], mask=mask, other=0.0
        )
        x = tl.load(x_ptr + rows[:, None] * stride_x + offsets[None, :], mask=mask, other=0.0)
        _, slope = activate(x.to(tl.float32) + bias[None, :], ACTIVATION, x.dtype)
        dx = dout.to(tl.float32) * slope
        dbias += tl.sum(dx, axis=0)
        dx_ptrs = dx_ptr + rows[:, None] * columns + offsets[None, :]
        tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + tl.program_id(0) * columns + offsets, dbias, mask=inside)
