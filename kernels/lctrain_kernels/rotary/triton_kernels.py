"""Rotation of queries and keys in portable Triton, with and without their norm.

A tile holds all heads of TOKENS tokens as two halves [TOKENS, HEADS, HALF]: the columns that are
rotated together. Columns beyond the rotated ones pass through.
"""

import triton
import triton.language as tl


@triton.jit
def _columns(HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Returns the columns of both partners, and which of them exist."""
    pair = tl.arange(0, BLOCK_HALF)
    if INTERLEAVED:
        return 2 * pair, 2 * pair + 1, pair < HALF
    else:
        return pair, pair + HALF, pair < HALF


@triton.jit
def _load_angles(
    cos_ptr,
    sin_ptr,
    positions_ptr,
    tokens,
    num_tokens,
    num_rows,
    stride_table,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    FULL_TABLE: tl.constexpr,
):
    """cos and sin of both partners, each [TOKENS, 1, BLOCK_HALF] float32."""
    valid = tokens < num_tokens
    if positions_ptr is not None:
        rows = tl.load(positions_ptr + tokens, mask=valid, other=0)
    else:
        rows = tokens % num_rows
    pair = tl.arange(0, BLOCK_HALF)
    mask = valid[:, None] & (pair < HALF)[None, :]
    offsets = rows[:, None] * stride_table + pair[None, :]
    cos = tl.load(cos_ptr + offsets, mask=mask, other=1.0).to(tl.float32)[:, None, :]
    sin = tl.load(sin_ptr + offsets, mask=mask, other=0.0).to(tl.float32)[:, None, :]
    if FULL_TABLE:
        offsets += HALF
        cos2 = tl.load(cos_ptr + offsets, mask=mask, other=1.0).to(tl.float32)[:, None, :]
        sin2 = tl.load(sin_ptr + offsets, mask=mask, other=0.0).to(tl.float32)[:, None, :]
        return cos, sin, cos2, sin2
    else:
        return cos, sin, cos, sin


@triton.jit
def _offsets(tokens, heads, stride_token, stride_head):
    """[TOKENS, HEADS, 1] offsets of the heads' first columns."""
    return tokens[:, None, None] * stride_token + heads[None, :, None] * stride_head


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
    ROTARY: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Writes the columns that are not rotated: normalised if there is a weight, else copied."""
    columns = ROTARY + tl.arange(0, BLOCK_REST)
    inside = columns < HEAD_DIM
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
    cos,
    sin,
    cos2,
    sin2,
    tokens,
    num_tokens,
    stride_token,
    stride_head,
    eps,
    offset,
    NUM_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
):
    """Normalises (where there is a weight) and rotates all heads of some tokens."""
    heads = tl.arange(0, HEADS)
    first, second, inside = _columns(HALF, BLOCK_HALF, INTERLEAVED)
    rows = (tokens < num_tokens)[:, None, None] & (heads < NUM_HEADS)[None, :, None]
    mask = rows & inside[None, None, :]
    base = _offsets(tokens, heads, stride_token, stride_head)
    out_base = _offsets(tokens, heads, NUM_HEADS * HEAD_DIM, HEAD_DIM)
    a = tl.load(x_ptr + base + first[None, None, :], mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + base + second[None, None, :], mask=mask, other=0.0).to(tl.float32)
    rstd = 1.0
    if weight_ptr is not None:
        square = tl.sum(a * a + b * b, axis=2)
        if BLOCK_REST > 0:
            columns = 2 * HALF + tl.arange(0, BLOCK_REST)
            rest_mask = rows & (columns < HEAD_DIM)[None, None, :]
            rest = tl.load(x_ptr + base + columns[None, None, :], mask=rest_mask, other=0.0)
            rest = rest.to(tl.float32)
            square += tl.sum(rest * rest, axis=2)
        rstd = tl.rsqrt(square / HEAD_DIM + eps)[:, :, None]
        weight_a = tl.load(weight_ptr + first, mask=inside, other=0.0).to(tl.float32) + offset
        weight_b = tl.load(weight_ptr + second, mask=inside, other=0.0).to(tl.float32) + offset
        a = a * rstd * weight_a[None, None, :]
        b = b * rstd * weight_b[None, None, :]
    if INVERSE:
        out_a = a * cos + b * sin2
        out_b = b * cos2 - a * sin
    else:
        out_a = a * cos - b * sin
        out_b = b * cos2 + a * sin2
    dtype = out_ptr.dtype.element_ty
    tl.store(out_ptr + out_base + first[None, None, :], out_a.to(dtype), mask=mask)
    tl.store(out_ptr + out_base + second[None, None, :], out_b.to(dtype), mask=mask)
    if BLOCK_REST > 0:
        _copy_rest(
            x_ptr, out_ptr, rstd, weight_ptr, offset, base, out_base, rows,
            2 * HALF, HEAD_DIM, BLOCK_REST,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def rotary_kernel(
    q_ptr,
    k_ptr,
    q_out_ptr,
    k_out_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    num_tokens,
    num_rows,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_table,
    eps,
    offset,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    TOKENS: tl.constexpr,
    FULL_TABLE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
):
    """Rotates TOKENS tokens of q [T, Hq, D] and, if passed, k [T, Hk, D].

    Grid: (cdiv(T, TOKENS),). Results are contiguous; cos and sin [rows, R or R / 2]; a
    token's row is its position, or its index modulo the rows.
    """
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    cos, sin, cos2, sin2 = _load_angles(
        cos_ptr, sin_ptr, positions_ptr, tokens, num_tokens, num_rows, stride_table,
        HALF, BLOCK_HALF, FULL_TABLE,
    )  # fmt: skip
    _rotate_heads(
        q_ptr, q_out_ptr, q_weight_ptr, cos, sin, cos2, sin2, tokens, num_tokens, stride_qt,
        stride_qh, eps, offset, Q_HEADS, BLOCK_Q, HEAD_DIM, HALF, BLOCK_HALF, BLOCK_REST,
        INTERLEAVED, INVERSE,
    )  # fmt: skip
    if k_ptr is not None:
        _rotate_heads(
            k_ptr, k_out_ptr, k_weight_ptr, cos, sin, cos2, sin2, tokens, num_tokens, stride_kt,
            stride_kh, eps, offset, K_HEADS, BLOCK_K, HEAD_DIM, HALF, BLOCK_HALF, BLOCK_REST,
            INTERLEAVED, INVERSE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def norm_rotary_bwd_kernel(
    dout_ptr,
    x_ptr,
    dx_ptr,
    weight_ptr,
    dweight_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    num_tokens,
    num_rows,
    stride_dt,
    stride_dh,
    stride_xt,
    stride_xh,
    stride_table,
    eps,
    offset,
    NUM_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    FULL_TABLE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Gradients of the norm and rotation of x [T, H, D]. Grid: any number of programs.

    Programs walk over groups of TOKENS tokens. dx is contiguous; dweight [programs, D] float32
    holds parts of the sum over tokens and heads. The norm's statistics are computed again.
    """
    heads = tl.arange(0, HEADS)
    first, second, inside = _columns(HALF, BLOCK_HALF, INTERLEAVED)
    weight_a = tl.load(weight_ptr + first, mask=inside, other=0.0).to(tl.float32) + offset
    weight_b = tl.load(weight_ptr + second, mask=inside, other=0.0).to(tl.float32) + offset
    sum_a = tl.zeros([TOKENS, HEADS, BLOCK_HALF], tl.float32)
    sum_b = tl.zeros([TOKENS, HEADS, BLOCK_HALF], tl.float32)
    if BLOCK_REST > 0:
        columns = 2 * HALF + tl.arange(0, BLOCK_REST)
        inside_rest = columns < HEAD_DIM
        weight_c = tl.load(weight_ptr + columns, mask=inside_rest, other=0.0).to(tl.float32)
        weight_c += offset
        sum_c = tl.zeros([TOKENS, HEADS, BLOCK_REST], tl.float32)
    begin, step = tl.program_id(0) * TOKENS, tl.num_programs(0) * TOKENS
    for start in tl.range(begin, num_tokens, step, num_stages=STAGES):
        tokens = start + tl.arange(0, TOKENS).to(tl.int64)
        rows = (tokens < num_tokens)[:, None, None] & (heads < NUM_HEADS)[None, :, None]
        mask = rows & inside[None, None, :]
        base = _offsets(tokens, heads, stride_xt, stride_xh)
        dbase = _offsets(tokens, heads, stride_dt, stride_dh)
        out_base = _offsets(tokens, heads, NUM_HEADS * HEAD_DIM, HEAD_DIM)
        cos, sin, cos2, sin2 = _load_angles(
            cos_ptr, sin_ptr, positions_ptr, tokens, num_tokens, num_rows, stride_table,
            HALF, BLOCK_HALF, FULL_TABLE,
        )  # fmt: skip
        a = tl.load(x_ptr + base + first[None, None, :], mask=mask, other=0.0).to(tl.float32)
        b = tl.load(x_ptr + base + second[None, None, :], mask=mask, other=0.0).to(tl.float32)
        out_a = tl.load(dout_ptr + dbase + first[None, None, :], mask=mask, other=0.0)
        out_b = tl.load(dout_ptr + dbase + second[None, None, :], mask=mask, other=0.0)
        out_a, out_b = out_a.to(tl.float32), out_b.to(tl.float32)
        da = out_a * cos + out_b * sin2
        db = out_b * cos2 - out_a * sin
        square = tl.sum(a * a + b * b, axis=2)
        if BLOCK_REST > 0:
            rest = rows & inside_rest[None, None, :]
            c = tl.load(x_ptr + base + columns[None, None, :], mask=rest, other=0.0)
            dc = tl.load(dout_ptr + dbase + columns[None, None, :], mask=rest, other=0.0)
            c, dc = c.to(tl.float32), dc.to(tl.float32)
            square += tl.sum(c * c, axis=2)
        rstd = tl.rsqrt(square / HEAD_DIM + eps)[:, :, None]
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
        mean = (dot / HEAD_DIM)[:, :, None]
        dtype = dx_ptr.dtype.element_ty
        dx = dx_ptr + out_base
        tl.store(dx + first[None, None, :], ((da - a * mean) * rstd).to(dtype), mask=mask)
        tl.store(dx + second[None, None, :], ((db - b * mean) * rstd).to(dtype), mask=mask)
        if BLOCK_REST > 0:
            dc = ((dc - c * mean) * rstd).to(dtype)
            tl.store(dx + columns[None, None, :], dc, mask=rest)
    part = dweight_ptr + tl.program_id(0) * HEAD_DIM
    tl.store(part + first, tl.sum(tl.sum(sum_a, axis=0), axis=0), mask=inside)
    tl.store(part + second, tl.sum(tl.sum(sum_b, axis=0), axis=0), mask=inside)
    if BLOCK_REST > 0:
        tl.store(part + columns, tl.sum(tl.sum(sum_c, axis=0), axis=0), mask=inside_rest)
