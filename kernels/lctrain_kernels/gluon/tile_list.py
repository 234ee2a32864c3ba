"""The warp that hands out tiles of queries, for the persistent forward kernels."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from lctrain_kernels.gluon.step import key_blocks, load_window, scalar

TILE_FIELDS = gl.constexpr(9)  # of a tile: see fetch_tiles
TILES_AHEAD = gl.constexpr(2)  # tiles that are fetched before they are needed


@gluon.jit
def fetch_tiles(
    info,
    info_bars,
    packs,
    window,
    HEADS: gl.constexpr,
    TILE: gl.constexpr,
    FLAGS: gl.constexpr,
):
    """Fetches tiles from the list of all, ahead of those that work on them.

    A tile is nine numbers in shared memory; document -1 says that no work is left.
    """
    info_ready, info_empty = info_bars
    cu_q_ptr, cu_k_ptr, tiles_ptr, counter_ptr, num_items = packs
    window_ptr, window_left, window_right = window
    PACK: gl.constexpr = TILE[0]
    CONSUMERS: gl.constexpr = TILE[1]
    BLOCK_N: gl.constexpr = TILE[2]
    HAS_LEFT: gl.constexpr = FLAGS[0]
    HAS_RIGHT: gl.constexpr = FLAGS[1]
    POSITIONS: gl.constexpr = CONSUMERS * 64 // PACK
    HEAD_GROUPS: gl.constexpr = HEADS // PACK
    PARTS: gl.constexpr = (127 + POSITIONS) // POSITIONS
    lane: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    left, right = load_window(window_ptr, window_left, window_right)
    # Documents of like lengths, as many queries as keys, are served head by head, so that keys and
    # values stay in L2. With one that is much longer than the others, a late head's part of it
    # would have no company. Empty slots come last.
    slots = num_items // (PARTS * HEAD_GROUPS)
    most = gl.load(tiles_ptr + 1) + 1
    middle = tiles_ptr + slots // 2 * 2
    usual = gl.where(gl.load(middle) < 0, 0, gl.load(middle + 1) + 1)
    groups = gl.where(4 * usual >= most, 1, HEAD_GROUPS)
    item = gl.program_id(0)
    served = 0
    while item < num_items:
        following = gl.atomic_add(counter_ptr, 1) + gl.num_programs(0)
        section = item // (slots * PARTS * groups)
        rest = item % (slots * PARTS * groups)
        slot = rest // (PARTS * groups)
        rest = rest % (PARTS * groups)
        part = PARTS - 1 - rest // groups
        head = (section * groups + rest % groups) * PACK
        document = gl.load(tiles_ptr + 2 * slot)
        block = gl.load(tiles_ptr + 2 * slot + 1)
        known = gl.maximum(document, 0)
        begin_q = gl.load(cu_q_ptr + known)
        end_q = gl.load(cu_q_ptr + known + 1)
        begin_k = gl.load(cu_k_ptr + known)
        end_k = gl.load(cu_k_ptr + known + 1)
        length_q = end_q - begin_q
        length_k = end_k - begin_k
        first = block * 128 + part * POSITIONS
        if POSITIONS > 128:
            # A document has fewer tiles than are listed; the last of the list, its first, are none.
            listed = gl.cdiv(length_q, 128)
            first = (block - listed + gl.cdiv(length_q, POSITIONS)) * POSITIONS
        if (document >= 0) & (first >= 0) & (first < length_q):
            low, high = key_blocks(
                first,
                POSITIONS,
                length_k - length_q,
                length_k,
                left,
                right,
                HAS_LEFT,
                HAS_RIGHT,
                BLOCK_N,
            )
            stage = served % TILES_AHEAD
            mbarrier.wait(info_empty.index(stage), ((served // TILES_AHEAD) & 1) ^ 1)
            values = (document, end_q, length_q, end_k, length_k, first, head, low, high)
            for field in gl.static_range(9):
                info.index(stage * TILE_FIELDS + field).store(
                    gl.full([1], values[field], gl.int32, lane)
                )
            mbarrier.arrive(info_ready.index(stage), count=1)
            served += 1
        item = following
    stage = served % TILES_AHEAD
    mbarrier.wait(info_empty.index(stage), ((served // TILES_AHEAD) & 1) ^ 1)
    info.index(stage * TILE_FIELDS).store(gl.full([1], -1, gl.int32, lane))
    mbarrier.arrive(info_ready.index(stage), count=1)


@gluon.jit
def read_tile(info, served, WARPS: gl.constexpr):
    """(end_q, length_q, end_k, length_k, first, head, low, high) of a tile that is ready."""
    fields = served % TILES_AHEAD * TILE_FIELDS
    end_q = scalar(info.index(fields + 1), WARPS)
    length_q = scalar(info.index(fields + 2), WARPS)
    end_k = scalar(info.index(fields + 3), WARPS)
    length_k = scalar(info.index(fields + 4), WARPS)
    first = scalar(info.index(fields + 5), WARPS)
    head = scalar(info.index(fields + 6), WARPS)
    low = scalar(info.index(fields + 7), WARPS)
    high = scalar(info.index(fields + 8), WARPS)
    return end_q, length_q, end_k, length_k, first, head, low, high
