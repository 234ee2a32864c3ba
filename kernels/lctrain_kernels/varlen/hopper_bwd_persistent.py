"""Backward of varlen attention for Hopper up to D = 64, with persistent programs, in Gluon.

A program computes dk and dv of several tiles of keys, one after the other. The producer warp loads
the next tile's keys, values and first queries while the consumer warpgroups still compute, so the
start of a tile takes little time. Partial dq is added from registers, as in hopper_bwd_dq.py.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from lctrain_kernels.gluon.backward_pipeline import (
    allocate_query_bars,
    first_visit,
    load_rows,
    next_visit,
)
from lctrain_kernels.gluon.barriers import (
    BLOCK_EMPTY,
    PRODUCER_AND_CONSUMERS,
    VARLEN_BWD_PERSISTENT_STAGES,
    acquire_stage,
    drain_stages,
)
from lctrain_kernels.gluon.compat import copy_arrive, copy_async
from lctrain_kernels.gluon.coordinates import RAGGED, Bounds, Rows
from lctrain_kernels.gluon.forward_pipeline import load_block
from lctrain_kernels.gluon.key_tile_scheduler import (
    KEY_TILE_FIELDS,
    read_key_tile,
    schedule_key_tiles,
)
from lctrain_kernels.gluon.primitives import load_scalar, load_window
from lctrain_kernels.gluon.structures import Pipeline
from lctrain_kernels.varlen.hopper_bwd import BackwardPointers, BackwardStrides
from lctrain_kernels.varlen.hopper_bwd_persistent_compute import (
    DS_STAGES,
    KV_STAGES,
    PersistentBuffers,
    PersistentInputs,
    consume_key_tiles,
)


@gluon.jit
def _load_key_tiles(q_desc, do_desc, k_desc, v_desc, shared, pointers, total_q, TILE: gl.constexpr):
    """Runs the producer warp: loads keys and values of each tile, and the queries that see it.

    The lse and delta of a block of queries are loaded with it. All query heads of the group are
    visited.

    Args:
        q_desc: TMA descriptor of q [T, H, D].
        do_desc: TMA descriptor of dout [T, H, D].
        k_desc: TMA descriptor of k [Tk, Hk, D].
        v_desc: TMA descriptor of v [Tk, Hk, D].
        shared: Shared memory of the kernel, a PersistentBuffers.
        pointers: Tensors of the call, a BackwardPointers.
        total_q: Number of packed queries T.
        TILE: Tile sizes and head counts of the backward kernel, a BackwardShape.
    """
    GROUP: gl.constexpr = TILE.group
    BLOCK_M: gl.constexpr = TILE.block_m
    STAGES: gl.constexpr = TILE.stages
    lanes: gl.constexpr = gl.BlockedLayout([BLOCK_M // 32], [32], [1], [0])
    local = gl.arange(0, BLOCK_M, lanes)
    index = 0
    step = 0
    mbarrier.wait(shared.tile_bars.ready, 0)
    document = load_scalar(shared.tiles.index(0), 1)
    while document >= 0:
        tile = read_key_tile(shared.tiles, 1)
        mbarrier.arrive(shared.tile_bars.empty, count=1)
        kv = index % KV_STAGES
        kv_ready = shared.kv_bars.ready.index(kv)
        mbarrier.wait(shared.kv_bars.empty.index(kv), ((index // KV_STAGES) & 1) ^ 1)
        keys = Rows(tile.begin_k + tile.length_k, RAGGED - tile.length_k + tile.first, tile.head_kv)
        mbarrier.expect(kv_ready, 2 * TILE.block_n * TILE.block_d * 2)
        load_rows(k_desc, shared.k, 2 * kv, kv_ready, keys)
        load_rows(v_desc, shared.v, 2 * kv, kv_ready, keys)
        visit = first_visit(tile, True)
        for _ in range(GROUP * (tile.high - tile.low)):
            stage = step % STAGES
            head = tile.head_kv * GROUP + visit.member
            first_query = visit.block * BLOCK_M
            vector = head.to(gl.int64) * total_q + tile.begin_q + first_query + local
            left_here = tile.length_q - first_query
            queries = Rows(tile.begin_q + tile.length_q, RAGGED - left_here, head)
            acquire_stage(BLOCK_EMPTY, step, STAGES, PRODUCER_AND_CONSUMERS)
            copy_async(shared.lse.index(stage), pointers.lse + vector, mask=local < left_here)
            copy_arrive(shared.q_ready.index(stage))
            load_block(q_desc, shared.q.index(stage), shared.q_ready.index(stage), queries)
            copy_async(shared.delta.index(stage), pointers.delta + vector, mask=local < left_here)
            copy_arrive(shared.dout_ready.index(stage))
            load_block(do_desc, shared.dout.index(stage), shared.dout_ready.index(stage), queries)
            visit = next_visit(visit, tile, GROUP, True)
            step += 1
        index += 1
        mbarrier.wait(shared.tile_bars.ready, index & 1)
        document = load_scalar(shared.tiles.index(0), 1)
    drain_stages(BLOCK_EMPTY, step, STAGES, PRODUCER_AND_CONSUMERS)


@gluon.jit(
    do_not_specialize=[
        "per_head",
        "total_q",
        "window_left",
        "window_right",
        "threshold",
        "first_head",
        "num_items",
    ]
)
def varlen_bwd_persistent_hopper_kernel(
    q_desc,
    do_desc,
    k_desc,
    v_desc,
    dq_desc,
    pointers: BackwardPointers,
    per_head,
    strides: BackwardStrides,
    total_q,
    window_left,
    window_right,
    scale,
    softcap,
    threshold,
    keep_scale,
    first_head,
    num_items,
    TILE: gl.constexpr,
    FLAGS: gl.constexpr,
):
    """Computes dk and dv, and adds partial dq to a float32 buffer, with persistent programs.

    The arguments are those of varlen_bwd_hopper_kernel with TILE.dq_from_registers, without dropout
    and softcap, and num_items: tiles of the schedule times key/value heads. pointers.semaphores is
    the counter of work items, an int32, zero at launch. TILE has 64 columns and 128 queries.

    Grid: at most one program per multiprocessor.
    """
    BLOCK_M: gl.constexpr = TILE.block_m
    BLOCK_D: gl.constexpr = TILE.block_d
    STAGES: gl.constexpr = TILE.stages
    gl.static_assert(BLOCK_M == 128 and BLOCK_D == 64, "a block is 128 queries of 64 columns")
    gl.static_assert(TILE.dq_from_registers, "there is no dQ warp")
    gl.static_assert(not (FLAGS.has_dropout or FLAGS.has_softcap), "plain attention only")
    gl.static_assert(STAGES <= VARLEN_BWD_PERSISTENT_STAGES, "named barriers overlap")
    dtype: gl.constexpr = q_desc.dtype
    left, right = load_window(pointers.window, window_left, window_right)
    window = Bounds(left, right)
    vector_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    n_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_D], dtype)
    m_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, BLOCK_D], dtype)
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_M], dtype)
    k_bufs = gl.allocate_shared_memory(dtype, [2 * KV_STAGES, 64, BLOCK_D], n_layout)
    v_bufs = gl.allocate_shared_memory(dtype, [2 * KV_STAGES, 64, BLOCK_D], n_layout)
    q_bufs = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_D], m_layout)
    do_bufs = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_D], m_layout)
    ds_bufs = gl.allocate_shared_memory(dtype, [2 * DS_STAGES, 64, BLOCK_M], ds_layout)
    lse_bufs = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], vector_layout)
    delta_bufs = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], vector_layout)
    tiles = gl.allocate_shared_memory(gl.int32, [KEY_TILE_FIELDS, 1], vector_layout)
    kv_ready = gl.allocate_shared_memory(gl.int64, [KV_STAGES, 1], bar)
    kv_empty = gl.allocate_shared_memory(gl.int64, [KV_STAGES, 1], bar)
    tile_ready = gl.allocate_shared_memory(gl.int64, [1], bar)
    tile_empty = gl.allocate_shared_memory(gl.int64, [1], bar)
    q_ready, dout_ready = allocate_query_bars(STAGES)
    for i in gl.static_range(2):
        mbarrier.init(kv_ready.index(i), count=1)
        mbarrier.init(kv_empty.index(i), count=2)
    mbarrier.init(tile_ready, count=1)
    mbarrier.init(tile_empty, count=3)
    tile_bars = Pipeline(tile_ready, tile_empty)
    kv_bars = Pipeline(kv_ready, kv_empty)
    shared = PersistentBuffers(
        *(k_bufs, v_bufs, q_bufs, do_bufs, ds_bufs, lse_bufs, delta_bufs),
        *(tiles, tile_bars, kv_bars, q_ready, dout_ready),
    )
    inputs = PersistentInputs(shared, pointers, strides, window, scale, per_head)
    gl.warp_specialize(
        [
            (consume_key_tiles, (inputs, TILE, FLAGS, 0)),
            (consume_key_tiles, (inputs, TILE, FLAGS, 1)),
            (_load_key_tiles, (q_desc, do_desc, k_desc, v_desc, shared, pointers, total_q, TILE)),
            (schedule_key_tiles, (tiles, tile_bars, pointers, num_items, window, TILE, FLAGS)),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )
