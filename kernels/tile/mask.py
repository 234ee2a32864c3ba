"""Which keys a query sees: ranges of tiles, and the mask inside a tile.

A window is (left, right) around the position i + shift with shift = Lk - Lq; causal is right = 0.
"""

import triton
import triton.language as tl

UNBOUNDED = 1 << 30
_UNBOUNDED = tl.constexpr(UNBOUNDED)


@triton.jit
def load_window(window_ptr, left, right):
    """Returns (left, right) from device memory where window_ptr is given; negative is unbounded."""
    if window_ptr is not None:
        left = tl.load(window_ptr)
        right = tl.load(window_ptr + 1)
    left = tl.where(left < 0, _UNBOUNDED, left)
    right = tl.where(right < 0, _UNBOUNDED, right)
    return left, right


@triton.jit
def key_range(
    first,
    positions,
    shift,
    length_k,
    left,
    right,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Returns (low, clear_low, clear_high, high) of the keys that queries [first, first + positions) see.

    Tiles start at multiples of BLOCK_N, from low to high; those in [clear_low, clear_high) are visible
    to every query and need no mask.
    """
    high = length_k
    clear_high = length_k // BLOCK_N * BLOCK_N
    if HAS_RIGHT:
        high = tl.minimum(high, tl.maximum(first + positions + shift + right, 0))
        clear = tl.maximum(first + shift + right + 1, 0) // BLOCK_N * BLOCK_N
        clear_high = tl.minimum(clear_high, clear)
    low = 0
    clear_low = 0
    if HAS_LEFT:
        low = tl.minimum(tl.maximum(first + shift - left, 0), length_k) // BLOCK_N * BLOCK_N
        clear_low = tl.maximum(first + positions - 1 + shift - left, 0)
    return low, clear_low, clear_high, high


@triton.jit
def query_range(
    first,
    keys,
    shift,
    length_q,
    length_k,
    left,
    right,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Returns (low, clear_low, clear_high, high) of the queries that see any key of [first, first + keys).

    Tiles start at multiples of BLOCK_M, from low to high; those in [clear_low, clear_high) see every key
    and need no mask. Queries beyond length_q count as clear: their weights vanish by lse.
    """
    low = 0
    clear_low = 0
    if HAS_RIGHT:
        low = tl.minimum(tl.maximum(first - shift - right, 0), length_q) // BLOCK_M * BLOCK_M
        clear_low = tl.maximum(first + keys - 1 - shift - right, 0)
    high = length_q
    clear_high = length_q
    if HAS_LEFT:
        high = tl.minimum(high, tl.maximum(first + keys - shift + left, 0))
        clear = tl.maximum(first - shift + left + 1, 0) // BLOCK_M * BLOCK_M
        clear_high = tl.minimum(clear_high, clear)
    # Keys beyond the document must stay at -inf: 2^(0 - lse) may overflow.
    clear_high = tl.where(first + keys > length_k, 0, clear_high)
    return low, clear_low, clear_high, high


@triton.jit
def visible(
    query, key, shift, length_k, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr
):
    """Broadcasts positions to the mask of a tile; True where the query sees the key."""
    mask = key < length_k
    if HAS_RIGHT:
        mask = mask & (key - query <= shift + right)
    if HAS_LEFT:
        mask = mask & (key - query >= shift - left)
    return mask
