"""The tile scheduler of the persistent Hopper backward kernel.

One warp of each program hands out tiles of keys to the program's producer and consumers.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from lctrain_kernels.gluon.primitives import load_scalar, query_blocks
from lctrain_kernels.gluon.structures import KeyTile

KEY_TILE_FIELDS = gl.constexpr(9)  # numbers of a tile: its document, and those of KeyTile


@gluon.jit
def schedule_key_tiles(
    tiles,
    tile_bars,
    pointers,
    num_items,
    window,
    TILE: gl.constexpr,
    FLAGS: gl.constexpr,
):
    """Runs the scheduler warp: takes work items, and writes their tiles to shared memory.

    A work item is a tile of keys and a key/value head; read_slot gives their order. The programs
    take items from one atomic counter in global memory. The warp takes an item when producer and
    consumers have read the one before, so the next tile is known while they work on this one, and
    no program holds more than one tile ahead. A tile with document -1 ends their loops.

    Args:
        tiles: Shared memory of one tile, [KEY_TILE_FIELDS, 1] int32.
        tile_bars: mbarriers of the tile, a Pipeline of one stage.
        pointers: Tensors of the call; semaphores is the counter of work items.
        num_items: Number of work items.
        window: Attention window of the call, a Bounds.
        TILE: Tile sizes and head counts of the backward kernel, a BackwardShape.
        FLAGS: Features beyond plain attention, a tile.structures.Flags.
    """
    lane: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    HEADS_KV: gl.constexpr = TILE.heads_kv
    BLOCK_N: gl.constexpr = TILE.block_n
    item = gl.program_id(0)
    index = 0
    while item < num_items:
        slot = item // HEADS_KV
        document = gl.load(pointers.tiles + 2 * slot)
        tile_k = gl.load(pointers.tiles + 2 * slot + 1)
        if document >= 0:
            begin_q = gl.load(pointers.cu_seqlens_q + document)
            length_q = gl.load(pointers.cu_seqlens_q + document + 1) - begin_q
            begin_k = gl.load(pointers.cu_seqlens_k + document)
            length_k = gl.load(pointers.cu_seqlens_k + document + 1) - begin_k
            nth = tile_k * HEADS_KV + item % HEADS_KV
            count = gl.maximum((length_k + BLOCK_N - 1) // BLOCK_N, 1)
            first = nth % count * BLOCK_N
            low, high = query_blocks(
                first,
                BLOCK_N,
                length_k - length_q,
                length_q,
                window.left,
                window.right,
                FLAGS.has_left,
                FLAGS.has_right,
                TILE.block_m,
            )
            head_kv = nth // count
            values = (document, head_kv, begin_q, length_q, begin_k, length_k, first, low, high)
            for field in gl.static_range(9):
                tiles.index(field).store(gl.full([1], values[field], gl.int32, lane))
            mbarrier.arrive(tile_bars.ready, count=1)
            mbarrier.wait(tile_bars.empty, index & 1)
            index += 1
        item = gl.atomic_add(pointers.semaphores, 1) + gl.num_programs(0)
    tiles.index(0).store(gl.full([1], -1, gl.int32, lane))
    mbarrier.arrive(tile_bars.ready, count=1)


@gluon.jit
def read_key_tile(tiles, WARPS: gl.constexpr):
    """Returns the KeyTile that the scheduler warp has written.

    The caller has waited for the tile's mbarrier.

    Args:
        tiles: Shared memory of one tile, [KEY_TILE_FIELDS, 1] int32.
        WARPS: Number of warps that read the tile.
    """
    return KeyTile(
        load_scalar(tiles.index(1), WARPS),
        load_scalar(tiles.index(2), WARPS),
        load_scalar(tiles.index(3), WARPS),
        load_scalar(tiles.index(4), WARPS),
        load_scalar(tiles.index(5), WARPS),
        load_scalar(tiles.index(6), WARPS),
        load_scalar(tiles.index(7), WARPS),
        load_scalar(tiles.index(8), WARPS),
    )
