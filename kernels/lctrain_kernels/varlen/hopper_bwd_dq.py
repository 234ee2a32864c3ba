"""Adds partial dq in global memory and rounds the sum, for the Hopper backward of varlen attention.

Partial dq is the dq of one block of queries from one tile of keys. The dQ warp adds it from shared
memory, or the consumer warpgroups add it from registers.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from lctrain_kernels.gluon.backward_pipeline import acquire_partial_dq, release_partial_dq
from lctrain_kernels.gluon.compat import partition_barrier, tma_add, tma_store
from lctrain_kernels.gluon.coordinates import RAGGED
from lctrain_kernels.gluon.primitives import (
    fence_release,
    query_blocks,
    red_add_v2,
    red_add_v4,
    wait_bulk_writes,
)

_RELEASE_EVERY = gl.constexpr(4)  # steps


@gluon.jit
def _earlier_tiles(block, tile, window, TILE: gl.constexpr):
    """Returns how many tiles of keys that see a block of queries come before this program's tile.

    Args:
        block: Index of the block of queries in the document.
        tile: The program's tile of keys, a KeyTile.
        window: Attention window of the call, a Bounds.
        TILE: Tile sizes and head counts of the backward kernel, a BackwardShape.
    """
    seen = gl.maximum(block * TILE.block_m + tile.length_k - tile.length_q - window.left, 0)
    return tile.first // TILE.block_n - seen // TILE.block_n


@gluon.jit
def _semaphore(semaphores, tile, step, TILE: gl.constexpr):
    """Returns the address of the semaphore of the block of dq to which a step of the program adds.

    A semaphore counts the partial dq added so far. Each block of queries of each document and head
    has its own.

    Args:
        semaphores: Counters of the call, a Semaphores.
        tile: The program's tile of keys, a KeyTile.
        step: Index of the step of the program's loop over blocks and heads.
        TILE: Tile sizes and head counts of the backward kernel, a BackwardShape.
    """
    head = tile.head_kv * TILE.group + step % TILE.group
    block = tile.high - 1 - step // TILE.group
    return (
        semaphores.pointer
        + head * semaphores.per_head
        + tile.begin_q // TILE.block_m
        + semaphores.document
        + block
    )


@gluon.jit
def _release_semaphores(semaphores, tile, begin, end, TILE: gl.constexpr):
    """Counts the partial dq of steps [begin, end) in their semaphores, after a release fence.

    The caller has waited until these partial dq are in global memory. The other arguments are those
    of _semaphore.
    """
    partition_barrier()
    fence_release()
    for step in range(begin, end):
        gl.atomic_add(_semaphore(semaphores, tile, step, TILE), 1, sem="relaxed")


@gluon.jit
def _acquire_semaphore(semaphore, count):
    """Waits until a semaphore shows that `count` partial dq of its block are in global memory.

    Args:
        semaphore: Address of the counter, int32.
        count: Number of partial dq to wait for.
    """
    arrived = gl.atomic_add(semaphore, 0, sem="acquire")
    while arrived < count:
        arrived = gl.atomic_add(semaphore, 0, sem="acquire")


@gluon.jit
def add_partial_dq(
    dq_desc,
    dq_bufs,
    semaphores,
    tile,
    window,
    TILE: gl.constexpr,
):
    """Runs the dQ warp, which adds partial dq from shared memory to the float32 buffer by TMA.

    The first tile of keys that sees a block of queries stores its partial dq. Later tiles add to
    it, in the order of their keys if TILE.deterministic. The semaphore of a block counts the
    partial dq that have been written to global memory.

    Args:
        dq_desc: TMA descriptor of the float32 buffer [T, H, D], in blocks of half of its columns.
        dq_bufs: Shared memory of partial dq, [2, block_m, columns] float32, one per warpgroup.
        semaphores: Counters of the call, a Semaphores.
        tile: The program's tile of keys, a KeyTile.
        window: Attention window of the call, a Bounds.
        TILE: Tile sizes and head counts of the backward kernel, a BackwardShape.
    """
    GROUP: gl.constexpr = TILE.group
    COLUMNS: gl.constexpr = TILE.block_d // 2
    steps = GROUP * (tile.high - tile.low)
    arrived = 0
    released = 0
    is_first = steps < 0  # false: no block came before
    for step in range(steps):
        block = tile.high - 1 - step // GROUP
        head = tile.head_kv * GROUP + step % GROUP
        was_first = is_first
        earlier = _earlier_tiles(block, tile, window, TILE)
        is_first = earlier == 0
        needed = earlier
        if not TILE.deterministic:
            needed = gl.minimum(earlier, 1)
        if arrived < needed:
            _acquire_semaphore(_semaphore(semaphores, tile, step, TILE), needed)
        row = RAGGED - tile.length_q + block * TILE.block_m
        for half in gl.static_range(2):
            coordinates = [RAGGED, tile.begin_q + tile.length_q, row, head, half * COLUMNS]
            partial = acquire_partial_dq(dq_bufs, half, dq_desc)
            if is_first:
                tma_store(dq_desc, coordinates, partial)
            else:
                tma_add(dq_desc, coordinates, partial)
        # The next semaphore is loaded one step ahead, so that no step waits for the load. The load
        # needs no acquire, because L2 orders the counted store and the TMA additions. All lanes
        # load one address at once, so they read one number.
        following = gl.minimum(step + 1, steps - 1)
        arrived = gl.load(_semaphore(semaphores, tile, following, TILE), volatile=True)
        release_partial_dq()
        # Partial dq of earlier steps are in global memory by now; this step's is not. A release
        # costs as much as half a step, so several steps share one, unless a program waits.
        if TILE.deterministic or was_first or step % _RELEASE_EVERY == 0:
            wait_bulk_writes(2)
            _release_semaphores(semaphores, tile, released, step, TILE)
            released = step
    wait_bulk_writes(0)
    _release_semaphores(semaphores, tile, released, steps, TILE)


@gluon.jit
def first_slab(
    dq_sum_ptr,
    slabs_per_head,
    tile,
    document,
    TILE: gl.constexpr,
):
    """Returns a pointer to the slab of the tile's first query head and last block of queries.

    The buffer is [heads, slabs, D / 8, 32, 4] float32. A slab holds dq of 16 queries of one
    document, [16, D], in the order in which the threads of a warp hold it after a matrix product:
    D / 8 groups of eight columns, 32 threads, and four numbers per thread. Thread t holds columns
    2 * (t % 4) and 2 * (t % 4) + 1 of its group, first for row t // 4, then for row t // 4 + 8.

    With TILE.slab_rows = 1, the buffer is [heads, queries, D], and the slabs are its rows.

    Args:
        dq_sum_ptr: Pointer to the buffer.
        slabs_per_head: Number of slabs per head.
        tile: The program's tile of keys, a KeyTile, whose last block of queries comes first.
        document: Index of the document in the pack.
        TILE: Tile sizes and head counts of the backward kernel, a BackwardShape.
    """
    slab = (tile.head_kv * TILE.group).to(gl.int64) * slabs_per_head
    slab += tile.begin_q // TILE.slab_rows + (tile.high - 1) * (TILE.block_m // TILE.slab_rows)
    if TILE.slab_rows > 1:  # slabs do not cross documents
        slab += document
    return dq_sum_ptr + slab * (TILE.slab_rows * TILE.head_dim)


@gluon.jit
def add_dq_of_step(
    dq,
    slabs,
    visit,
    tile,
    wanted,
    ROW: gl.constexpr,
    COLUMN: gl.constexpr,
    TILE: gl.constexpr,
):
    """Adds a warpgroup's part of a step's partial dq from registers to the float32 buffer.

    Args:
        dq: The part, 64 rows and some columns of the block's partial dq, float32.
        slabs: The buffer of the program's heads, a DqSlabs.
        visit: Query head and block of the step, a Visit.
        tile: The program's tile of keys, a KeyTile.
        wanted: False adds nothing.
        ROW: First row of the part.
        COLUMN: First column of the part.
        TILE: Tile sizes and head counts of the backward kernel, a BackwardShape.
    """
    ROWS: gl.constexpr = TILE.slab_rows
    SLABS: gl.constexpr = TILE.block_m // ROWS
    rows = tile.length_q - visit.block * TILE.block_m - ROW
    slab = visit.member * slabs.per_head - (tile.high - 1 - visit.block) * SLABS + ROW // ROWS
    slab_ptr = slabs.pointer + slab.to(gl.int64) * (ROWS * TILE.head_dim)
    _add_from_registers(dq, slab_ptr, gl.where(wanted, rows, 0), COLUMN, TILE)


@gluon.jit
def add_dq_to_slabs(dq, slabs, slab, rows, COLUMN: gl.constexpr, TILE: gl.constexpr):
    """Adds some columns of partial dq of 64 queries from registers to the float32 buffer.

    Args:
        dq: Partial dq, [64, columns] float32.
        slabs: The buffer, a DqSlabs.
        slab: Number of the first query's slab, after that of slabs.pointer.
        rows: Number of queries of the document from the first one on.
        COLUMN: First column.
        TILE: Tile sizes and head counts of the backward kernel, a BackwardShape.
    """
    slab_ptr = slabs.pointer + slab.to(gl.int64) * (TILE.slab_rows * TILE.head_dim)
    _add_from_registers(dq, slab_ptr, rows, COLUMN, TILE)


@gluon.jit
def _add_from_registers(dq, dq_ptr, rows, COLUMN: gl.constexpr, TILE: gl.constexpr):
    """Adds some columns of 64 rows of dq from registers to slabs of the float32 buffer.

    Each instruction of a warp adds to 512 contiguous bytes. With slabs of one query it adds to 32
    bytes of each of eight rows.

    Args:
        dq: Partial dq, [64, columns] float32.
        dq_ptr: The first row's slab; see first_slab.
        rows: Number of queries of the document from the first row on; nothing is added to others.
        COLUMN: First column.
        TILE: Tile sizes and head counts of the backward kernel, a BackwardShape.
    """
    HEAD_DIM: gl.constexpr = TILE.head_dim
    EIGHTS: gl.constexpr = dq.shape[1] // 8
    fours: gl.constexpr = gl.BlockedLayout(
        [1, EIGHTS, 2, 2], [32, 1, 1, 1], [4, 1, 1, 1], [3, 2, 1, 0]
    )
    layout: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, fours))
    # A number is at row 16 * warp + 8 * below + lane // 4, column 8 * eight + 2 * (lane % 4) + odd.
    # The reshape puts dimensions of threads before those of registers, and moves no data.
    parts = gl.reshape(dq, [4, 2, 8, EIGHTS, 4, 2])
    parts = gl.reshape(gl.permute(parts, (0, 2, 4, 3, 1, 5)), [128, EIGHTS, 2, 2])
    even, odd = gl.split(gl.convert_layout(parts, fours, assert_trivial=True))
    x0, x2 = gl.split(even)
    x1, x3 = gl.split(odd)
    thread = gl.arange(0, 128, gl.SliceLayout(1, layout))
    eight = COLUMN // 8 + gl.arange(0, EIGHTS, gl.SliceLayout(0, layout))
    inside = (eight * 8 < HEAD_DIM)[None, :]
    if TILE.slab_rows == 1:
        row = thread // 32 * 16 + thread % 32 // 4
        to = dq_ptr + (row * HEAD_DIM + thread % 4 * 2)
        to = to[:, None] + (eight * 8)[None, :]
        red_add_v2(to, gl.where(inside, (rows - row)[:, None], 0), x0, x1)
        red_add_v2(to + 8 * HEAD_DIM, gl.where(inside, (rows - row - 8)[:, None], 0), x2, x3)
    else:
        to = dq_ptr + (thread // 32 * (16 * HEAD_DIM) + thread % 32 * 4)
        to = to[:, None] + (eight * 128)[None, :]
        left = gl.where(inside, (rows - thread // 32 * 16)[:, None], 0)
        red_add_v4(to, left, x0, x1, x2, x3)


@gluon.jit
def round_dq(
    dq_sum_ptr,
    dq_ptr,
    stride_t,
    stride_h,
    semaphores,
    tile,
    window,
    scale,
    TILE: gl.constexpr,
    FLAGS: gl.constexpr,
):
    """Writes to dq, scaled and rounded, the blocks whose sum is complete after this program.

    A block is complete if no later tile of keys sees its queries. The function waits until all
    earlier tiles have added their partial dq.

    Args:
        dq_sum_ptr: Sum of the partial dq, [T, H, D] float32.
        dq_ptr: Gradient to write, of the same layout, in half precision.
        stride_t: Stride of tokens of both, in elements.
        stride_h: Stride of heads of both, in elements.
        semaphores: Counters of the call, a Semaphores.
        tile: The program's tile of keys, a KeyTile.
        window: Attention window of the call, a Bounds.
        scale: Factor of the sum: softmax scale times 1 / keep probability.
        TILE: Tile sizes and head counts of the backward kernel, a BackwardShape.
        FLAGS: Features beyond plain attention, a tile.structures.Flags.
    """
    GROUP: gl.constexpr = TILE.group
    BLOCK_M: gl.constexpr = TILE.block_m
    BLOCK_N: gl.constexpr = TILE.block_n
    BLOCK_D: gl.constexpr = TILE.block_d
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [128 // BLOCK_D, BLOCK_D // 4], [4, 1], [1, 0])
    end = tile.high
    if tile.first + BLOCK_N < tile.length_k:
        end, _ = query_blocks(
            tile.first + BLOCK_N,
            BLOCK_N,
            tile.length_k - tile.length_q,
            tile.length_q,
            window.left,
            window.right,
            FLAGS.has_left,
            FLAGS.has_right,
            BLOCK_M,
        )
        end = gl.minimum(end, tile.high)
    row = gl.arange(0, BLOCK_M, gl.SliceLayout(1, layout))
    column = gl.arange(0, BLOCK_D, gl.SliceLayout(0, layout))
    for item in range(GROUP * (end - tile.low)):
        head = tile.head_kv * GROUP + item % GROUP
        block = end - 1 - item // GROUP
        semaphore = _semaphore(semaphores, tile, (tile.high - end) * GROUP + item, TILE)
        _acquire_semaphore(semaphore, _earlier_tiles(block, tile, window, TILE) + 1)
        query = block * BLOCK_M + row
        offset = (tile.begin_q + query).to(gl.int64) * stride_t + head * stride_h
        offset = offset[:, None] + column[None, :]
        inside = (query < tile.length_q)[:, None] & (column < TILE.head_dim)[None, :]
        # The load bypasses L1, which may hold values from before the additions.
        whole = gl.load(dq_sum_ptr + offset, mask=inside, other=0.0, cache_modifier=".cg")
        gl.store(dq_ptr + offset, (whole * scale).to(dq_ptr.dtype.element_ty), mask=inside)
