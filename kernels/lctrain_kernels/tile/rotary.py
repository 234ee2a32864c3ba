"""Applies RoPE to tiles in Llama's half-split layout, where columns d and d + D/2 are a pair.

A tile is padded to BLOCK_D columns, a power of two. It holds the first half of each row in its
columns [0, BLOCK_D / 2), and the second half in [BLOCK_D / 2, BLOCK_D). So the columns of a pair
are BLOCK_D / 2 apart. load_pairs and store_pairs convert from and to memory's D columns.

An angle is computed as a number of full turns of the circle. The frequency is a sum of two float32,
so full turns cancel exactly for positions up to 16,777,216. Two short polynomials give the sine and
cosine of the remainder.

Multiply-adds are fused explicitly, so every kernel computes the same bits of a rotated tile. The
backward therefore recomputes the logits of the forward.
"""

import triton
import triton.language as tl

_TURNS = tl.constexpr(0.15915493667125702)  # 1 / (2 pi) as two float32
_TURNS_REST = tl.constexpr(6.420638243994045e-09)
_TWO_PI = tl.constexpr(6.283185307179586)


@triton.jit
def load_frequencies(inv_freq_ptr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Returns the RoPE frequencies in full turns per position, as a pair (high, rest).

    Both are [BLOCK_D / 2] float32, and their sum is inv_freq / (2 pi). Padding is 0.

    Args:
        inv_freq_ptr: RoPE frequencies [HEAD_DIM / 2] float32, in radians per position.
        HEAD_DIM: Head dim D.
        BLOCK_D: Number of columns of a tile.
    """
    index = tl.arange(0, BLOCK_D // 2)
    inv_freq = tl.load(inv_freq_ptr + index, mask=index < HEAD_DIM // 2, other=0.0)
    high = inv_freq * _TURNS
    rest = tl.fma(inv_freq, _TURNS, -high)
    return high, tl.fma(inv_freq, _TURNS_REST, rest)


@triton.jit
def cos_sin(delta, high, rest):
    """Returns the cosine and sine of a rotation by `delta` positions, accurate to about 1e-7.

    Args:
        delta: Number of positions, an integer in float32, broadcastable to the result.
        high: First float32 of the frequency from load_frequencies, broadcastable to the result.
        rest: Second float32 of the frequency from load_frequencies, in the shape of `high`.
    """
    whole = tl.floor(delta * high + 0.5)
    turns = tl.fma(delta, high, -whole)  # one rounding, of a value below 1
    turns = tl.fma(delta, rest, turns)
    quarter = tl.floor(turns * 4.0 + 0.5)
    x = tl.fma(quarter, -0.25, turns) * _TWO_PI  # at most pi / 4
    square = x * x
    sin = tl.fma(square, -1.9515295891e-4, 8.3321608736e-3)
    sin = tl.fma(sin, square, -1.6666654611e-1)
    sin = tl.fma(sin * square, x, x)
    cos = tl.fma(square, 2.443315711809948e-5, -1.388731625493765e-3)
    cos = tl.fma(cos, square, 4.166664568298827e-2)
    cos = tl.fma(cos * square, square, tl.fma(square, -0.5, 1.0))
    index = quarter.to(tl.int32)
    odd = (index & 1) != 0
    new_cos = tl.where(odd, sin, cos)
    new_sin = tl.where(odd, cos, sin)
    new_cos = tl.where(((index + 1) & 2) != 0, -new_cos, new_cos)
    new_sin = tl.where((index & 2) != 0, -new_sin, new_sin)
    return new_cos, new_sin


@triton.jit
def pair_columns(HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Returns the memory column of each column of a tile in half-split layout, [BLOCK_D] int32.

    Columns of the padding also get a number; load_pairs masks them.
    """
    columns = tl.arange(0, BLOCK_D)
    if BLOCK_D == HEAD_DIM:
        return columns
    else:
        HALF: tl.constexpr = BLOCK_D // 2
        return columns % HALF + (columns // HALF) * (HEAD_DIM // 2)


@triton.jit
def _inside(rows, length, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BOUNDED: tl.constexpr):
    inside = (tl.arange(0, BLOCK_D) % (BLOCK_D // 2) < HEAD_DIM // 2)[None, :]
    if BOUNDED:
        inside = inside & (rows < length)[:, None]
    return inside


@triton.jit
def load_pairs(
    ptrs, rows, length, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BOUNDED: tl.constexpr
):
    """Loads a tile [M, BLOCK_D] in the half-split layout of this module, with zeros in its padding.

    Args:
        ptrs: Addresses of the elements, [M, BLOCK_D], in the order of pair_columns.
        rows: Position of each row in the document, [M].
        length: Number of rows of the document.
        HEAD_DIM: Head dim D, the number of columns in memory.
        BLOCK_D: Number of columns of the tile.
        BOUNDED: Whether rows from `length` on are padding; False if the tile has none.
    """
    if BLOCK_D == HEAD_DIM:
        if BOUNDED:
            return tl.load(ptrs, mask=(rows < length)[:, None], other=0.0)
        else:
            return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=_inside(rows, length, HEAD_DIM, BLOCK_D, BOUNDED), other=0.0)


@triton.jit
def store_pairs(ptrs, values, rows, length, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Stores a tile [M, BLOCK_D] in the half-split layout of this module, without its padding.

    The arguments are those of load_pairs, with `values` as the tile.
    """
    if BLOCK_D == HEAD_DIM:
        tl.store(ptrs, values.to(ptrs.dtype.element_ty), mask=(rows < length)[:, None])
    else:
        inside = _inside(rows, length, HEAD_DIM, BLOCK_D, True)
        tl.store(ptrs, values.to(ptrs.dtype.element_ty), mask=inside)


@triton.jit
def rotate(x, cos, sin, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Returns the tile x [ROWS, BLOCK_D] rotated by RoPE, in float32.

    Args:
        x: Tile in the half-split layout of this module.
        cos: Cosine of the angles, broadcastable to [ROWS, BLOCK_D / 2].
        sin: Sine of the angles, in the shape of cos.
        ROWS: Number of rows of x.
        BLOCK_D: Number of columns of x.
    """
    pairs = tl.permute(tl.reshape(x.to(tl.float32), [ROWS, 2, BLOCK_D // 2]), (0, 2, 1))
    low, high = tl.split(pairs)
    pairs = tl.join(tl.fma(low, cos, -(high * sin)), tl.fma(high, cos, low * sin))
    return tl.reshape(tl.permute(pairs, (0, 2, 1)), [ROWS, BLOCK_D])
