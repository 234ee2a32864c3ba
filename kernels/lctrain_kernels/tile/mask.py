"""The keys that a query sees: ranges of tiles, and the mask inside a tile.

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
def key_ranges(
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
    """Returns (low, clear_low, clear_high, high) for queries [first, first + positions).

    Tiles of keys start at multiples of BLOCK_N. Those in [clear_low, clear_high) are visible to
    every query; those in [low, clear_low), empty without a left bound, and [clear_high, high) need
    a mask.
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
        clear = tl.maximum(first + positions - 1 + shift - left, 0)
        clear_low = tl.minimum(tl.cdiv(clear, BLOCK_N) * BLOCK_N, high)
        clear_high = tl.maximum(clear_high, clear_low)
    return low, clear_low, clear_high, high


@triton.jit
def query_ranges(
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
    """Returns (low, clear_low, clear_high, high) for keys [first, first + keys).

    Tiles of queries start at multiples of BLOCK_M. Those in [clear_low, clear_high) see every key;
    those in [low, clear_low) and [clear_high, high), empty without a left bound, need a mask.
    Queries beyond length_q count as clear (they are zero), keys beyond length_k do not: 2^(0 - lse)
    may overflow.
    """
    low = 0
    clear_low = 0
    if HAS_RIGHT:
        low = tl.minimum(tl.maximum(first - shift - right, 0), length_q) // BLOCK_M * BLOCK_M
        clear_low = tl.cdiv(tl.maximum(first + keys - 1 - shift - right, 0), BLOCK_M) * BLOCK_M
    high = length_q
    clear_high = length_q
    if HAS_LEFT:
        high = tl.minimum(high, tl.maximum(first + keys - shift + left, low))
        clear_high = tl.maximum(first - shift + left + 1, 0) // BLOCK_M * BLOCK_M
    clear_low = tl.where(first + keys > length_k, high, tl.minimum(clear_low, high))
    clear_high = tl.maximum(tl.minimum(clear_high, high), clear_low)
    return low, clear_low, clear_high, high


@triton.jit
def mask_logits(x, local, first_seen, last_seen, HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr):
    """Sets x to -inf outside [first_seen, last_seen].

    Bounds per row against positions inside the tile cost one comparison and one select an element.

    Args:
        x: [M, N] logits.
        local: [1, N], positions inside the tile.
        first_seen: [M], first position that a row sees, relative to the tile.
        last_seen: [M], last position that a row sees, relative to the tile.
        HAS_FIRST: Whether first_seen bounds.
        HAS_LAST: Whether last_seen bounds.
    """
    if HAS_FIRST:
        x = tl.where(local >= first_seen[:, None], x, float("-inf"))
    if HAS_LAST:
        x = tl.where(local <= last_seen[:, None], x, float("-inf"))
    return x
