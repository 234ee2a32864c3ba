"""The tile scheduler of the persistent Hopper forward kernels.

One warp of each program hands out tiles of queries to the program's producer and consumers.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from lctrain_kernels.gluon.primitives import key_blocks, load_scalar, load_window
from lctrain_kernels.gluon.structures import WorkTile

TILE_FIELDS = gl.constexpr(9)  # numbers of a tile: its document, and those of WorkTile
TILES_AHEAD = gl.constexpr(2)  # tiles that are fetched before they are needed


@gluon.jit
def schedule_tiles(
    tiles,
    tile_bars,
    inputs,
    window,
    TILE: gl.constexpr,
    FLAGS: gl.constexpr,
):
    """Runs the scheduler warp: takes work items, and writes their tiles to shared memory.

    A work item is a tile of queries and a group of heads. The programs take items from one atomic
    counter in global memory. The warp is up to TILES_AHEAD tiles ahead of the consumers. A tile
    with document -1 ends the loops of producer and consumers.

    Args:
        tiles: Shared memory of the tiles, [TILES_AHEAD * TILE_FIELDS, 1] int32.
        tile_bars: mbarriers of the pipeline of tiles.
        inputs: Document boundaries, tile schedule and work counter, a SchedulerInputs.
        window: Window of the call: left and right bounds, or their device tensor.
        TILE: Tile sizes and head counts of the forward kernel, a ForwardShape.
        FLAGS: Features beyond plain attention, a tile.structures.Flags.
    """
    POSITIONS: gl.constexpr = TILE.consumers * 64 // TILE.pack
    HEAD_GROUPS: gl.constexpr = TILE.heads // TILE.pack
    PARTS: gl.constexpr = (127 + POSITIONS) // POSITIONS
    lane: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    left, right = load_window(window.pointer, window.left, window.right)
    # Documents of similar lengths are taken head by head, so that keys and values stay in L2. If
    # one document is much longer, all heads of a tile come together: otherwise a late head's long
    # tiles would run alone at the end. Empty slots come last.
    slots = inputs.num_items // (PARTS * HEAD_GROUPS)
    most = gl.load(inputs.tiles + 1) + 1
    middle = inputs.tiles + slots // 2 * 2
    usual = gl.where(gl.load(middle) < 0, 0, gl.load(middle + 1) + 1)
    groups = gl.where(4 * usual >= most, 1, HEAD_GROUPS)
    item = gl.program_id(0)
    tile_index = 0
    while item < inputs.num_items:
        following = gl.atomic_add(inputs.counter, 1) + gl.num_programs(0)
        section = item // (slots * PARTS * groups)
        rest = item % (slots * PARTS * groups)
        slot = rest // (PARTS * groups)
        rest = rest % (PARTS * groups)
        part = PARTS - 1 - rest // groups
        head = (section * groups + rest % groups) * TILE.pack
        document = gl.load(inputs.tiles + 2 * slot)
        block = gl.load(inputs.tiles + 2 * slot + 1)
        known = gl.maximum(document, 0)
        begin_q = gl.load(inputs.cu_seqlens_q + known)
        end_q = gl.load(inputs.cu_seqlens_q + known + 1)
        begin_k = gl.load(inputs.cu_seqlens_k + known)
        end_k = gl.load(inputs.cu_seqlens_k + known + 1)
        length_q = end_q - begin_q
        length_k = end_k - begin_k
        first = block * 128 + part * POSITIONS
        if POSITIONS > 128:
            # A document has fewer tiles than the schedule lists; its first listed slots are empty.
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
                FLAGS.has_left,
                FLAGS.has_right,
                TILE.block_n,
            )
            stage = tile_index % TILES_AHEAD
            mbarrier.wait(tile_bars.empty.index(stage), ((tile_index // TILES_AHEAD) & 1) ^ 1)
            values = (document, end_q, length_q, end_k, length_k, first, head, low, high)
            for field in gl.static_range(9):
                tiles.index(stage * TILE_FIELDS + field).store(
                    gl.full([1], values[field], gl.int32, lane)
                )
            mbarrier.arrive(tile_bars.ready.index(stage), count=1)
            tile_index += 1
        item = following
    stage = tile_index % TILES_AHEAD
    mbarrier.wait(tile_bars.empty.index(stage), ((tile_index // TILES_AHEAD) & 1) ^ 1)
    tiles.index(stage * TILE_FIELDS).store(gl.full([1], -1, gl.int32, lane))
    mbarrier.arrive(tile_bars.ready.index(stage), count=1)


@gluon.jit
def read_tile(tiles, tile_index, WARPS: gl.constexpr):
    """Returns the WorkTile that the scheduler warp has written as the program's tile_index-th tile.

    The caller has waited for the tile's mbarrier.

    Args:
        tiles: Shared memory of the tiles, [TILES_AHEAD * TILE_FIELDS, 1] int32.
        tile_index: Number of tiles that the program has worked on before.
        WARPS: Number of warps that read the tile.
    """
    fields = tile_index % TILES_AHEAD * TILE_FIELDS
    end_q = load_scalar(tiles.index(fields + 1), WARPS)
    length_q = load_scalar(tiles.index(fields + 2), WARPS)
    end_k = load_scalar(tiles.index(fields + 3), WARPS)
    length_k = load_scalar(tiles.index(fields + 4), WARPS)
    first = load_scalar(tiles.index(fields + 5), WARPS)
    head = load_scalar(tiles.index(fields + 6), WARPS)
    low = load_scalar(tiles.index(fields + 7), WARPS)
    high = load_scalar(tiles.index(fields + 8), WARPS)
    return WorkTile(end_q, length_q, end_k, length_k, first, head, low, high)
