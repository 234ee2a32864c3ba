"""Causal and window masks: which keys a tile of queries sees, and the mask inside a tile.

Masks are aligned at the bottom right. Query i of a document with Lq queries and Lk keys is at
position i + shift, with shift = Lk - Lq. It sees `left` keys before its position and `right` keys
after it; a causal mask has right = 0.
"""

import triton
import triton.language as tl

UNBOUNDED = 1 << 30
_UNBOUNDED = tl.constexpr(UNBOUNDED)


@triton.jit
def load_window(window_ptr, left, right):
    """Returns the attention window (left, right), with 2^30 for a side that is unbounded.

    Args:
        window_ptr: (left, right) in device memory, [2] int32, or None.
        left: Visible keys before a query's own position, if window_ptr is None; negative is
            unbounded.
        right: Visible keys after a query's own position, if window_ptr is None; negative is
            unbounded.
    """
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
    """Returns the positions (low, clear_low, clear_high, high) that split a loop over keys.

    Queries [first, first + positions) see keys in [low, high) only. Blocks of BLOCK_N keys in
    [clear_low, clear_high) need no mask, because every query sees all their keys. Blocks in
    [low, clear_low) and in [clear_high, high) need one. Without a left bound, [low, clear_low) is
    empty. All numbers except `high` are multiples of BLOCK_N, or equal to `high`.

    Args:
        first: Position of the first query in the document.
        positions: Number of queries.
        shift: Number of keys minus number of queries of the document.
        length_k: Number of keys of the document.
        left: Visible keys before a query's own position.
        right: Visible keys after a query's own position.
        HAS_LEFT: Whether the window has a left bound.
        HAS_RIGHT: Whether the window has a right bound.
        BLOCK_N: Number of keys of a block.
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
    """Returns the positions (low, clear_low, clear_high, high) that split a loop over queries.

    Only queries in [low, high) see any of the keys [first, first + keys). Blocks of BLOCK_M queries
    in [clear_low, clear_high) need no mask, because their queries see all these keys. Blocks in
    [low, clear_low) and in [clear_high, high) need one. Without a left bound, [clear_high, high) is
    empty.

    Queries beyond length_q need no mask, because they are loaded as zero. Keys beyond length_k do,
    because 2^(0 - lse) may overflow.

    Args:
        first: Position of the first key in the document.
        keys: Number of keys.
        shift: Number of keys minus number of queries of the document.
        length_q: Number of queries of the document.
        length_k: Number of keys of the document.
        left: Visible keys before a query's own position.
        right: Visible keys after a query's own position.
        HAS_LEFT: Whether the window has a left bound.
        HAS_RIGHT: Whether the window has a right bound.
        BLOCK_M: Number of queries of a block.
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
    """Returns the logits x [M, N], with -inf where a column is outside [first_seen, last_seen].

    Each bound costs one comparison and one select per element.

    Args:
        x: Logits, [M, N].
        local: Positions of the columns inside the tile, [1, N].
        first_seen: First column that each row sees, relative to the tile, [M].
        last_seen: Last column that each row sees, relative to the tile, [M].
        HAS_FIRST: Whether to apply first_seen.
        HAS_LAST: Whether to apply last_seen.
    """
    if HAS_FIRST:
        x = tl.where(local >= first_seen[:, None], x, float("-inf"))
    if HAS_LAST:
        x = tl.where(local <= last_seen[:, None], x, float("-inf"))
    return x
