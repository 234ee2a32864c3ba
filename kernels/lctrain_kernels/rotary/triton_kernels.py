"""Triton kernels of rotary embeddings of queries and keys, with or without RMSNorm before them.

A tile holds all heads of TOKENS tokens as two halves [TOKENS, HEADS, HALF]. The first half holds
the first column of each pair, the second half the second column. Columns that are not rotated are
copied.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class RotaryShape(NamedTuple):
    """Constants of a rotary kernel, passed as one launch argument.

    Attributes:
        head_dim: Head dim D of queries and keys.
        half: Number of column pairs that are rotated.
        block_half: Smallest power of two >= half.
        block_rest: Smallest power of two >= the number of unrotated columns; 0 if all are rotated.
        full_table: Whether cos and sin have a column per rotated column, instead of one per pair.
        interleaved: Whether columns 2 i and 2 i + 1 are a pair, instead of i and i + half.
    """

    head_dim: int
    half: int
    block_half: int
    block_rest: int
    full_table: bool
    interleaved: bool


class RotaryPointers(NamedTuple):
    """Pointers to the tensors of rotary_kernel; the kernel's docstring gives their shapes."""

    q: Any
    k: Any
    q_out: Any
    k_out: Any
    q_weight: Any
    k_weight: Any
    cos: Any
    sin: Any
    positions: Any


class RotaryStrides(NamedTuple):
    """Strides of tokens and heads of q and k, and of rows of cos and sin, in elements."""

    q_token: Any
    q_head: Any
    k_token: Any
    k_head: Any
    table: Any


class BackwardPointers(NamedTuple):
    """Pointers to the tensors that norm_rotary_bwd_kernel accesses.

    The kernel's docstring gives their shapes.
    """

    dout: Any
    x: Any
    dx: Any
    weight: Any
    dweight: Any
    cos: Any
    sin: Any
    positions: Any


class BackwardStrides(NamedTuple):
    """Strides of tokens and heads of dout and x, and of rows of cos and sin, in elements."""

    dout_token: Any
    dout_head: Any
    x_token: Any
    x_head: Any
    table: Any


class Angles(NamedTuple):
    """Cosines and sines of a tile's tokens, each [TOKENS, 1, BLOCK_HALF] float32.

    Attributes:
        cos: Cosines for the first column of each pair.
        sin: Sines for the first column of each pair.
        cos2: Cosines for the second column of each pair.
        sin2: Sines for the second column of each pair.
    """

    cos: Any
    sin: Any
    cos2: Any
    sin2: Any


@triton.jit
def _columns(SHAPE: tl.constexpr):
    """Returns (first column of each pair, second column of each pair, mask of real pairs).

    Each is [block_half]; pairs from `half` on are padding.
    """
    pair = tl.arange(0, SHAPE.block_half)
    if SHAPE.interleaved:
        return 2 * pair, 2 * pair + 1, pair < SHAPE.half
    else:
        return pair, pair + SHAPE.half, pair < SHAPE.half


@triton.jit
def _load_angles(pointers, tokens, num_tokens, num_rows, stride_table, SHAPE: tl.constexpr):
    """Loads the cosines and sines of a tile's tokens, and returns them as Angles.

    A token reads the row `positions[token]` of cos and sin; without positions, the row of its index
    modulo num_rows.
    """
    valid = tokens < num_tokens
    if pointers.positions is not None:
        rows = tl.load(pointers.positions + tokens, mask=valid, other=0)
    else:
        rows = tokens % num_rows
    pair = tl.arange(0, SHAPE.block_half)
    mask = valid[:, None] & (pair < SHAPE.half)[None, :]
    offsets = rows[:, None] * stride_table + pair[None, :]
    cos = tl.load(pointers.cos + offsets, mask=mask, other=1.0).to(tl.float32)[:, None, :]
    sin = tl.load(pointers.sin + offsets, mask=mask, other=0.0).to(tl.float32)[:, None, :]
    if SHAPE.full_table:
        offsets += SHAPE.half
        cos2 = tl.load(pointers.cos + offsets, mask=mask, other=1.0).to(tl.float32)[:, None, :]
        sin2 = tl.load(pointers.sin + offsets, mask=mask, other=0.0).to(tl.float32)[:, None, :]
        return Angles(cos, sin, cos2, sin2)
    else:
        return Angles(cos, sin, cos, sin)


@triton.jit
def _offsets(tokens, heads, stride_token, stride_head):
    """Returns the offset of the first column of each head, [TOKENS, HEADS, 1], in elements."""
    heads = heads[None, :, None].to(tl.int64)
    return tokens[:, None, None] * stride_token + heads * stride_head


@triton.jit
def _copy_rest(
    x_ptr,
    out_ptr,
    factor,
    weight_ptr,
    offset,
    x_offsets,
    out_offsets,
    mask,
    SHAPE: tl.constexpr,
):
    """Copies the columns that are not rotated; with a norm weight, they are normalised.

    Args:
        x_ptr: Input [T, H, D].
        out_ptr: Output [T, H, D], contiguous.
        factor: 1 / root mean square of each head, [TOKENS, HEADS, 1]; 1 without a norm.
        weight_ptr: Weight of the norm, [D], or None.
        offset: Number that is added to the weight.
        x_offsets: Offset of each head's first column in the input, [TOKENS, HEADS, 1], in elements.
        out_offsets: Offset of each head's first column in the output, in the same form.
        mask: Which heads and tokens are not padding, [TOKENS, HEADS, 1].
        SHAPE: Constants of the kernel.
    """
    columns = 2 * SHAPE.half + tl.arange(0, SHAPE.block_rest)
    inside = columns < SHAPE.head_dim
    mask = mask & inside[None, None, :]
    x = tl.load(x_ptr + x_offsets + columns[None, None, :], mask=mask, other=0.0)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32) + offset
        x = x.to(tl.float32) * factor * weight[None, None, :]
    tl.store(
        out_ptr + out_offsets + columns[None, None, :], x.to(out_ptr.dtype.element_ty), mask=mask
    )


@triton.jit
def _rotate_heads(
    x_ptr,
    out_ptr,
    weight_ptr,
    angles,
    tokens,
    num_tokens,
    stride_token,
    stride_head,
    eps,
    offset,
    NUM_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    SHAPE: tl.constexpr,
    INVERSE: tl.constexpr,
):
    """Rotates all heads of a tile's tokens, after RMSNorm if weight_ptr is not None.

    Args:
        x_ptr: Input [T, NUM_HEADS, D].
        out_ptr: Output [T, NUM_HEADS, D], contiguous.
        weight_ptr: Weight of the norm, [D], or None.
        angles: Cosines and sines of the tokens, an Angles.
        tokens: Indices of the tokens, [TOKENS] int64.
        num_tokens: Number of tokens T.
        stride_token: Stride of the input's tokens, in elements.
        stride_head: Stride of the input's heads, in elements.
        eps: Epsilon of the norm.
        offset: Number that is added to the weight.
        NUM_HEADS: Number of heads.
        HEADS: NUM_HEADS rounded up to a power of two.
        SHAPE: Constants of the kernel.
        INVERSE: Whether to rotate by the negative angle.
    """
    heads = tl.arange(0, HEADS)
    first, second, inside = _columns(SHAPE)
    rows = (tokens < num_tokens)[:, None, None] & (heads < NUM_HEADS)[None, :, None]
    mask = rows & inside[None, None, :]
    base = _offsets(tokens, heads, stride_token, stride_head)
    out_base = _offsets(tokens, heads, NUM_HEADS * SHAPE.head_dim, SHAPE.head_dim)
    a = tl.load(x_ptr + base + first[None, None, :], mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + base + second[None, None, :], mask=mask, other=0.0).to(tl.float32)
    rstd = 1.0
    if weight_ptr is not None:
        square = tl.sum(a * a + b * b, axis=2)
        if SHAPE.block_rest > 0:
            columns = 2 * SHAPE.half + tl.arange(0, SHAPE.block_rest)
            rest_mask = rows & (columns < SHAPE.head_dim)[None, None, :]
            rest = tl.load(x_ptr + base + columns[None, None, :], mask=rest_mask, other=0.0)
            rest = rest.to(tl.float32)
            square += tl.sum(rest * rest, axis=2)
        rstd = tl.rsqrt(square / SHAPE.head_dim + eps)[:, :, None]
        weight_a = tl.load(weight_ptr + first, mask=inside, other=0.0).to(tl.float32) + offset
        weight_b = tl.load(weight_ptr + second, mask=inside, other=0.0).to(tl.float32) + offset
        a = a * rstd * weight_a[None, None, :]
        b = b * rstd * weight_b[None, None, :]
    if INVERSE:
        out_a = a * angles.cos + b * angles.sin2
        out_b = b * angles.cos2 - a * angles.sin
    else:
        out_a = a * angles.cos - b * angles.sin
        out_b = b * angles.cos2 + a * angles.sin2
    dtype = out_ptr.dtype.element_ty
    tl.store(out_ptr + out_base + first[None, None, :], out_a.to(dtype), mask=mask)
    tl.store(out_ptr + out_base + second[None, None, :], out_b.to(dtype), mask=mask)
    if SHAPE.block_rest > 0:
        _copy_rest(
            x_ptr, out_ptr, rstd, weight_ptr, offset, base, out_base, rows, SHAPE
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def rotary_kernel(
    pointers: RotaryPointers,
    num_tokens,
    num_rows,
    strides: RotaryStrides,
    eps,
    offset,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TOKENS: tl.constexpr,
    SHAPE: tl.constexpr,
    INVERSE: tl.constexpr,
):
    """Rotates q [T, Hq, D] and, if passed, k [T, Hk, D]; each program takes TOKENS tokens.

    If norm weights [D] are passed, RMSNorm comes first, with the weights plus `offset`. q_out and
    k_out are contiguous. cos and sin are [num_rows, R] or [num_rows, R / 2], with R rotated
    columns. A token's row in them is positions[token] if positions [T] are passed, else the token's
    index modulo num_rows. Grid: (cdiv(T, TOKENS),).

    Args:
        pointers: Pointers to the tensors above.
        num_tokens: Number of tokens T.
        num_rows: Number of rows of cos and sin.
        strides: Strides of the tensors.
        eps: Number that RMSNorm adds to the mean square.
        offset: Number that RMSNorm adds to the weights: 1 for Gemma, else 0.
        Q_HEADS: Number of query heads Hq.
        K_HEADS: Number of key heads Hk.
        BLOCK_Q: Smallest power of two >= Q_HEADS.
        BLOCK_K: Smallest power of two >= K_HEADS.
        TOKENS: Number of tokens of a program.
        SHAPE: The RotaryShape.
        INVERSE: Whether to rotate by the negative angle, as the backward does.
    """
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    angles = _load_angles(pointers, tokens, num_tokens, num_rows, strides.table, SHAPE)
    _rotate_heads(
        pointers.q, pointers.q_out, pointers.q_weight, angles, tokens, num_tokens,
        strides.q_token, strides.q_head, eps, offset, Q_HEADS, BLOCK_Q, SHAPE, INVERSE,
    )  # fmt: skip
    if pointers.k is not None:
        _rotate_heads(
            pointers.k, pointers.k_out, pointers.k_weight, angles, tokens, num_tokens,
            strides.k_token, strides.k_head, eps, offset, K_HEADS, BLOCK_K, SHAPE, INVERSE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def norm_rotary_bwd_kernel(
    pointers: BackwardPointers,
    num_tokens,
    num_rows,
    strides: BackwardStrides,
    eps,
    offset,
    NUM_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """Computes the gradients of RMSNorm followed by rotation, for q or for k.

    The grid is persistent: each program loops over groups of TOKENS tokens and recomputes the
    norm's statistics.

    - dout (gradient of the rotated x), x and dx are [T, H, D]; dx is contiguous.
    - weight is [D]; dweight [programs, D] float32 holds each program's partial sum over tokens and
      heads.
    - cos, sin and positions are those of rotary_kernel.

    Grid: any number of programs.

    Args:
        pointers: Pointers to the tensors above.
        num_tokens: Number of tokens T.
        num_rows: Number of rows of cos and sin.
        strides: Strides of the tensors.
        eps: Number that RMSNorm adds to the mean square.
        offset: Number that RMSNorm adds to the weight: 1 for Gemma, else 0.
        NUM_HEADS: Number of heads H.
        HEADS: Smallest power of two >= NUM_HEADS.
        TOKENS: Number of tokens that a program loads at a time.
        STAGES: Depth of the load pipeline.
        SHAPE: The RotaryShape.
    """
    # Local variables, because Triton 3.6 accepts no field of a launch constant in a shape.
    BLOCK_HALF: tl.constexpr = SHAPE.block_half
    BLOCK_REST: tl.constexpr = SHAPE.block_rest
    heads = tl.arange(0, HEADS)
    first, second, inside = _columns(SHAPE)
    weight_a = tl.load(pointers.weight + first, mask=inside, other=0.0).to(tl.float32) + offset
    weight_b = tl.load(pointers.weight + second, mask=inside, other=0.0).to(tl.float32) + offset
    sum_a = tl.zeros([TOKENS, HEADS, BLOCK_HALF], tl.float32)
    sum_b = tl.zeros([TOKENS, HEADS, BLOCK_HALF], tl.float32)
    if BLOCK_REST > 0:
        columns = 2 * SHAPE.half + tl.arange(0, BLOCK_REST)
        inside_rest = columns < SHAPE.head_dim
        weight_c = tl.load(pointers.weight + columns, mask=inside_rest, other=0.0).to(tl.float32)
        weight_c += offset
        sum_c = tl.zeros([TOKENS, HEADS, BLOCK_REST], tl.float32)
    begin, step = tl.program_id(0) * TOKENS, tl.num_programs(0) * TOKENS
    for start in tl.range(begin, num_tokens, step, num_stages=STAGES):
        tokens = start + tl.arange(0, TOKENS).to(tl.int64)
        rows = (tokens < num_tokens)[:, None, None] & (heads < NUM_HEADS)[None, :, None]
        mask = rows & inside[None, None, :]
        base = _offsets(tokens, heads, strides.x_token, strides.x_head)
        dbase = _offsets(tokens, heads, strides.dout_token, strides.dout_head)
        out_base = _offsets(tokens, heads, NUM_HEADS * SHAPE.head_dim, SHAPE.head_dim)
        angles = _load_angles(pointers, tokens, num_tokens, num_rows, strides.table, SHAPE)
        a = tl.load(pointers.x + base + first[None, None, :], mask=mask, other=0.0).to(tl.float32)
        b = tl.load(pointers.x + base + second[None, None, :], mask=mask, other=0.0).to(tl.float32)
        out_a = tl.load(pointers.dout + dbase + first[None, None, :], mask=mask, other=0.0)
        out_b = tl.load(pointers.dout + dbase + second[None, None, :], mask=mask, other=0.0)
        out_a, out_b = out_a.to(tl.float32), out_b.to(tl.float32)
        da = out_a * angles.cos + out_b * angles.sin2
        db = out_b * angles.cos2 - out_a * angles.sin
        square = tl.sum(a * a + b * b, axis=2)
        if BLOCK_REST > 0:
            rest = rows & inside_rest[None, None, :]
            c = tl.load(pointers.x + base + columns[None, None, :], mask=rest, other=0.0)
            dc = tl.load(pointers.dout + dbase + columns[None, None, :], mask=rest, other=0.0)
            c, dc = c.to(tl.float32), dc.to(tl.float32)
            square += tl.sum(c * c, axis=2)
        rstd = tl.rsqrt(square / SHAPE.head_dim + eps)[:, :, None]
        a, b = a * rstd, b * rstd
        sum_a += da * a
        sum_b += db * b
        da, db = da * weight_a[None, None, :], db * weight_b[None, None, :]
        dot = tl.sum(da * a + db * b, axis=2)
        if BLOCK_REST > 0:
            c = c * rstd
            sum_c += dc * c
            dc = dc * weight_c[None, None, :]
            dot += tl.sum(dc * c, axis=2)
        mean = (dot / SHAPE.head_dim)[:, :, None]
        dtype = pointers.dx.dtype.element_ty
        dx = pointers.dx + out_base
        tl.store(dx + first[None, None, :], ((da - a * mean) * rstd).to(dtype), mask=mask)
        tl.store(dx + second[None, None, :], ((db - b * mean) * rstd).to(dtype), mask=mask)
        if BLOCK_REST > 0:
            dc = ((dc - c * mean) * rstd).to(dtype)
            tl.store(dx + columns[None, None, :], dc, mask=rest)
    part = pointers.dweight + tl.program_id(0) * SHAPE.head_dim
    tl.store(part + first, tl.sum(tl.sum(sum_a, axis=0), axis=0), mask=inside)
    tl.store(part + second, tl.sum(tl.sum(sum_b, axis=0), axis=0), mask=inside)
    if BLOCK_REST > 0:
        tl.store(part + columns, tl.sum(tl.sum(sum_c, axis=0), axis=0), mask=inside_rest)
