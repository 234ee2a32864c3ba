"""Shared memory of the persistent Hopper forward kernels: allocation, and TMA loads and stores."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from lctrain_kernels.gluon.compat import partition_barrier, reinterpret, tma_load, tma_store
from lctrain_kernels.gluon.coordinates import RAGGED
from lctrain_kernels.gluon.structures import ForwardBuffers, Pipeline
from lctrain_kernels.gluon.tile_scheduler import TILE_FIELDS, TILES_AHEAD

_CHUNK = gl.constexpr(64)  # columns of a 128-byte swizzle


@gluon.jit
def allocate_bars(TILE: gl.constexpr, Q_LOADS: gl.constexpr, K_LOADS: gl.constexpr):
    """Allocates the buffer for the scheduler's tiles, and the mbarriers of all pipelines.

    Args:
        TILE: Tile sizes and head counts of the forward kernel, a ForwardShape.
        Q_LOADS: Number of TMA loads that fill a stage of queries.
        K_LOADS: Number of TMA loads that fill a stage of keys.

    Returns:
        The fields tiles, tile_bars, q_bars, k_ready and v_ready of ForwardBuffers.
    """
    CONSUMERS: gl.constexpr = TILE.consumers
    Q_STAGES: gl.constexpr = TILE.q_stages
    STAGES: gl.constexpr = TILE.stages
    vector_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    tiles = gl.allocate_shared_memory(gl.int32, [TILES_AHEAD * TILE_FIELDS, 1], vector_layout)
    tile_ready = gl.allocate_shared_memory(gl.int64, [TILES_AHEAD, 1], bar)
    tile_empty = gl.allocate_shared_memory(gl.int64, [TILES_AHEAD, 1], bar)
    q_ready = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], bar)
    q_empty = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], bar)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    for i in gl.static_range(TILES_AHEAD):
        mbarrier.init(tile_ready.index(i), count=1)
        mbarrier.init(tile_empty.index(i), count=CONSUMERS + 1)
    for i in gl.static_range(Q_STAGES):
        mbarrier.init(q_ready.index(i), count=Q_LOADS)
        mbarrier.init(q_empty.index(i), count=CONSUMERS)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=K_LOADS)
        mbarrier.init(v_ready.index(i), count=1)
    return tiles, Pipeline(tile_ready, tile_empty), Pipeline(q_ready, q_empty), k_ready, v_ready


@gluon.jit
def allocate_forward(dtype: gl.constexpr, TILE: gl.constexpr):
    """Allocates the ForwardBuffers of varlen and dual chunk attention.

    Args:
        dtype: Dtype of queries, keys and values.
        TILE: Tile sizes and head counts of the forward kernel, a ForwardShape.
    """
    BLOCK_N: gl.constexpr = TILE.block_n
    BLOCK_D: gl.constexpr = TILE.block_d
    STAGES: gl.constexpr = TILE.stages
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_D], dtype)
    kv_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_D], dtype)
    q_bufs = gl.allocate_shared_memory(
        dtype, [TILE.q_stages * TILE.consumers, 64, BLOCK_D], q_layout
    )
    k_bufs = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_D], kv_layout)
    v_bufs = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_D], kv_layout)
    tiles, tile_bars, q_bars, k_ready, v_ready = allocate_bars(TILE, 1, 1)
    return ForwardBuffers(q_bufs, k_bufs, v_bufs, tiles, tile_bars, q_bars, k_ready, v_ready)


@gluon.jit
def allocate_branches(dtype: gl.constexpr, TILE: gl.constexpr):
    """Allocates the shared memory of the forward of differential attention.

    A buffer of queries holds both branches, and later up to two of the three results. The other
    results are stored in the returned buffers [n, 64, block_dv].

    Args:
        dtype: Dtype of queries, keys and values.
        TILE: Tile sizes and head counts of the forward kernel, a ForwardShape.

    Returns:
        (ForwardBuffers, buffers of results).
    """
    CONSUMERS: gl.constexpr = TILE.consumers
    BLOCK_N: gl.constexpr = TILE.block_n
    BLOCK_D: gl.constexpr = TILE.block_d
    BLOCK_DV: gl.constexpr = TILE.block_dv
    STAGES: gl.constexpr = TILE.stages
    NUM_K: gl.constexpr = TILE.num_k
    OUT_BUFFERS: gl.constexpr = 3 - 2 * BLOCK_D // BLOCK_DV
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([128, BLOCK_D], dtype)
    k_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_D], dtype)
    v_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_DV], dtype)
    out_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_DV], dtype)
    q_bufs = gl.allocate_shared_memory(dtype, [TILE.q_stages * CONSUMERS, 128, BLOCK_D], q_layout)
    k_bufs = gl.allocate_shared_memory(dtype, [STAGES * NUM_K, BLOCK_N, BLOCK_D], k_layout)
    v_bufs = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_DV], v_layout)
    out_bufs = gl.allocate_shared_memory(dtype, [CONSUMERS * OUT_BUFFERS, 64, BLOCK_DV], out_layout)
    tiles, tile_bars, q_bars, k_ready, v_ready = allocate_bars(TILE, 2, NUM_K)
    shared = ForwardBuffers(q_bufs, k_bufs, v_bufs, tiles, tile_bars, q_bars, k_ready, v_ready)
    return shared, out_bufs


@gluon.jit
def load_queries(
    desc,
    q_bufs,
    q_ready,
    stage,
    rows,
    TILE: gl.constexpr,
    BRANCH: gl.constexpr = 0,
    BRANCHES: gl.constexpr = 1,
):
    """Starts the TMA loads of a tile of queries, in pieces of up to 64 positions of one head.

    Args:
        desc: TMA descriptor of q [T, H, D], in blocks of a piece's positions by 64 columns.
        q_bufs: Shared memory of the queries.
        q_ready: mbarriers that the loads complete, one per stage.
        stage: Pipeline stage to fill.
        rows: Coordinates of the tile's queries, a QueryRows.
        TILE: Tile sizes and head counts of the forward kernel, a ForwardShape.
        BRANCH: Index of the branch, which selects the 64 rows of a buffer to fill.
        BRANCHES: Number of branches. Each is loaded separately and arrives at q_ready.
    """
    CONSUMERS: gl.constexpr = TILE.consumers
    BLOCK_D: gl.constexpr = TILE.block_d
    ROWS: gl.constexpr = CONSUMERS * 64
    POSITIONS: gl.constexpr = ROWS // TILE.pack
    RUN: gl.constexpr = POSITIONS if POSITIONS < 64 else 64
    COLUMNS: gl.constexpr = BLOCK_D // _CHUNK
    dtype: gl.constexpr = desc.dtype
    BYTES: gl.constexpr = dtype.primitive_bitwidth // 8
    rows_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([RUN, _CHUNK], dtype)
    mbarrier.expect(q_ready.index(stage), ROWS * BLOCK_D * BYTES)
    for consumer in gl.static_range(CONSUMERS):
        chunks = reinterpret(
            q_bufs.index(stage * CONSUMERS + consumer),
            dtype,
            [BRANCHES * COLUMNS * (64 // RUN), RUN, _CHUNK],
            rows_layout,
        )
        for column in gl.static_range(COLUMNS):
            for run in gl.static_range(64 // RUN):
                index = consumer * (64 // RUN) + run
                tma_load(
                    desc,
                    [
                        RAGGED,
                        rows.end,
                        RAGGED - rows.length + rows.first + index % (POSITIONS // RUN) * RUN,
                        rows.head + index // (POSITIONS // RUN),
                        column * _CHUNK,
                    ],
                    q_ready.index(stage),
                    reinterpret(
                        chunks.index((BRANCH * COLUMNS + column) * (64 // RUN) + run),
                        dtype,
                        [1, 1, RUN, 1, _CHUNK],
                        desc.layout,
                    ),
                )


@gluon.jit
def load_block(desc, buffer, ready, rows):
    """Starts the TMA load of a block of rows of one head, which completes an mbarrier.

    The function also tells the mbarrier the number of bytes to expect.

    Args:
        desc: TMA descriptor of a tensor [T, H, D], in blocks of the buffer's shape.
        buffer: Shared memory [rows, columns].
        ready: mbarrier that the load completes.
        rows: Coordinates of the rows to load, a Rows.
    """
    dtype: gl.constexpr = desc.dtype
    BYTES: gl.constexpr = dtype.primitive_bitwidth // 8
    ROWS: gl.constexpr = buffer.shape[0]
    BLOCK_D: gl.constexpr = buffer.shape[1]
    mbarrier.expect(ready, ROWS * BLOCK_D * BYTES)
    tma_load(
        desc,
        [RAGGED, rows.end, rows.row, rows.head, 0],
        ready,
        reinterpret(buffer, dtype, [1, 1, ROWS, 1, BLOCK_D], desc.layout),
    )


@gluon.jit
def store_rows(desc, buffer, rows, RUN: gl.constexpr):
    """Starts the TMA copy of a warpgroup's 64 rows of the result from shared to global memory.

    Args:
        desc: TMA descriptor of the result [T, H, D], in blocks of RUN by 64 columns.
        buffer: Shared memory of the rows, [64, BLOCK_D].
        rows: Coordinates of this warpgroup's rows, a QueryRows.
        RUN: Number of the 64 rows that belong to one head: consecutive positions.
    """
    dtype: gl.constexpr = desc.dtype
    COLUMNS: gl.constexpr = buffer.shape[1] // _CHUNK
    rows_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([RUN, _CHUNK], dtype)
    fence_async_shared()
    partition_barrier()
    chunks = reinterpret(buffer, dtype, [COLUMNS * (64 // RUN), RUN, _CHUNK], rows_layout)
    for column in gl.static_range(COLUMNS):
        for run in gl.static_range(64 // RUN):
            tma_store(
                desc,
                [
                    RAGGED,
                    rows.end,
                    RAGGED - rows.length + rows.first,
                    rows.head + run,
                    column * _CHUNK,
                ],
                reinterpret(
                    chunks.index(column * (64 // RUN) + run),
                    dtype,
                    [1, 1, RUN, 1, _CHUNK],
                    desc.layout,
                ),
            )
