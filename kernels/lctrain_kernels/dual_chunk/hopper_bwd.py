"""Backward of dual chunk attention for Hopper, in Gluon: one launch per range of keys.

ranges.py defines the ranges; a chunk has c tokens. SUCC multiplies keys rotated by -c, INTRA
unrotated queries and keys, INTER queries rotated to the inter position.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from lctrain_kernels.dual_chunk.hopper_bwd_blocks import blocks_of_relation, first_query
from lctrain_kernels.dual_chunk.hopper_bwd_compute import compute
from lctrain_kernels.dual_chunk.hopper_ranges import chunk_begin
from lctrain_kernels.dual_chunk.hopper_structures import (
    BackwardInputs,
    BackwardPointers,
    BackwardStrides,
    ChunkTile,
    ResultPointers,
)
from lctrain_kernels.dual_chunk.ranges import INTRA
from lctrain_kernels.gluon.backward_pipeline import (
    acquire_partial_dq,
    allocate_partial_dq,
    allocate_query_bars,
    load_rows,
    next_block,
    read_slot,
    release_partial_dq,
)
from lctrain_kernels.gluon.barriers import (
    BLOCK_EMPTY,
    DOUT_EMPTY,
    DUAL_CHUNK_BWD_STAGES,
    PRODUCER_AND_CONSUMERS,
    Q_EMPTY,
    VARLEN_BWD_LATER_STAGES,
    acquire_stage,
    drain_stages,
)
from lctrain_kernels.gluon.compat import copy_arrive, copy_async, tma_add
from lctrain_kernels.gluon.coordinates import RAGGED, Rows
from lctrain_kernels.gluon.forward_pipeline import load_block
from lctrain_kernels.gluon.structures import BackwardBuffers, DqSlabs, Statistics


@gluon.jit
def _load(
    q_desc,
    do_desc,
    k_desc,
    v_desc,
    shared,
    stats,
    tile,
    TILE: gl.constexpr,
    RELATION: gl.constexpr,
):
    """Runs the producer warp: loads the tile's keys and values, then blocks of queries and dout."""
    GROUP: gl.constexpr = TILE.group
    BLOCK_M: gl.constexpr = TILE.block_m
    STAGES: gl.constexpr = TILE.stages
    keys = Rows(tile.begin_k + tile.end, RAGGED - tile.end + tile.first, tile.head_kv)
    mbarrier.expect(shared.kv_ready, 2 * TILE.block_n * TILE.block_d * 2)
    load_rows(k_desc, shared.k, 0, shared.kv_ready, keys)
    load_rows(v_desc, shared.v, 0, shared.kv_ready, keys)
    lanes: gl.constexpr = gl.BlockedLayout([BLOCK_M // 32], [32], [1], [0])
    local = gl.arange(0, BLOCK_M, lanes)
    head = tile.head_kv * GROUP
    block = tile.blocks - 1
    steps = GROUP * tile.blocks
    for step in range(steps):
        stage = step % STAGES
        first = first_query(block, tile.run, RELATION, BLOCK_M)
        query = first + local
        vector = (head.to(gl.int64) * stats.total_q + tile.begin_q + query) * 4
        queries = Rows(tile.begin_q + tile.length_q, RAGGED - tile.length_q + first, head)
        if TILE.dq_from_registers:
            acquire_stage(BLOCK_EMPTY, step, STAGES, PRODUCER_AND_CONSUMERS)
        else:
            acquire_stage(Q_EMPTY, step, STAGES, PRODUCER_AND_CONSUMERS)
        copy_async(shared.lse.index(stage), stats.lse + vector, mask=query < tile.length_q)
        copy_arrive(shared.q_ready.index(stage))
        load_block(q_desc, shared.q.index(stage), shared.q_ready.index(stage), queries)
        if not TILE.dq_from_registers:
            acquire_stage(DOUT_EMPTY, step, STAGES, PRODUCER_AND_CONSUMERS)
        copy_async(shared.delta.index(stage), stats.lse + vector + 1, mask=query < tile.length_q)
        copy_arrive(shared.dout_ready.index(stage))
        load_block(do_desc, shared.dout.index(stage), shared.dout_ready.index(stage), queries)
        head, block = next_block(head, block, tile.head_kv, GROUP)
    if TILE.dq_from_registers:
        drain_stages(BLOCK_EMPTY, steps, STAGES, PRODUCER_AND_CONSUMERS)
    else:
        drain_stages(Q_EMPTY, steps, STAGES, PRODUCER_AND_CONSUMERS)
        drain_stages(DOUT_EMPTY, steps, STAGES, PRODUCER_AND_CONSUMERS)


@gluon.jit
def _add_partial_dq(dq_desc, dq_bufs, tile, TILE: gl.constexpr, RELATION: gl.constexpr):
    """Runs the dQ warp, which adds partial dq from shared memory to the float32 buffer."""
    GROUP: gl.constexpr = TILE.group
    COLUMNS: gl.constexpr = TILE.block_d // 2
    head = tile.head_kv * GROUP
    block = tile.blocks - 1
    for _ in range(GROUP * tile.blocks):
        row = RAGGED - tile.length_q + first_query(block, tile.run, RELATION, TILE.block_m)
        for half in gl.static_range(2):
            dq_half = acquire_partial_dq(dq_bufs, half, dq_desc)
            coordinates = [RAGGED, tile.begin_q + tile.length_q, row, head, half * COLUMNS]
            tma_add(dq_desc, coordinates, dq_half)
        release_partial_dq()
        head, block = next_block(head, block, tile.head_kv, GROUP)


@gluon.jit(do_not_specialize=["per_head", "total_q", "chunk_length", "succ_length"])
def dual_chunk_bwd_hopper_kernel(
    q_desc,
    do_desc,
    k_desc,
    v_desc,
    dq_desc,
    pointers: BackwardPointers,
    per_head,
    strides: BackwardStrides,
    total_q,
    chunk_length,
    succ_length,
    scale,
    TILE: gl.constexpr,
    RELATION: gl.constexpr,
    FULL_WEIGHTS: gl.constexpr,
):
    """Computes dk and dv of a tile of keys for one range, and adds its dq to a float32 buffer.

    A program processes a tile of keys of one key/value head, and all queries of the head's group
    that see them in the range RELATION. Grid: (tiles * key/value heads,). Launches, in this order:

    - SUCC (skipped if succ_length is 0) stores dk and dv in float32 sums [Tk, Hk, D], which have
      the strides of dk. dk is unscaled and is the gradient of the rotated keys; another kernel
      rotates it before the next launch.
    - INTRA adds to the sums. It writes the final dk and dv of keys of a document's last chunk.
    - INTER adds to the sums, and writes the final dk and dv of all other keys.

    stats [H, T, 4] float32 comes from dual_chunk_rotate. dq_desc describes a float32 buffer
    [T, H, D], to which the gradients of q_desc's queries are added: zero before the first launch,
    rotated to the inter position before INTER. With TILE.dq_from_registers, dq_desc is None, and
    the buffer is pointers.dq_sum, in slabs of 16 queries of a document: varlen's first_slab
    describes them. per_head is its number of slabs per head.

    FULL_WEIGHTS says whether weights stay in float32 until dS is computed; they always do with
    TILE.dq_from_registers. gluon/structures.py describes other arguments.
    """
    dtype: gl.constexpr = q_desc.dtype
    BLOCK_M: gl.constexpr = TILE.block_m
    BLOCK_D: gl.constexpr = TILE.block_d
    STAGES: gl.constexpr = TILE.stages
    FROM_REGISTERS: gl.constexpr = TILE.dq_from_registers
    MOST: gl.constexpr = VARLEN_BWD_LATER_STAGES if FROM_REGISTERS else DUAL_CHUNK_BWD_STAGES
    HALF: gl.constexpr = TILE.block_n // 2
    gl.static_assert(STAGES <= MOST, "named barriers overlap")
    gl.static_assert((dq_desc is None) == FROM_REGISTERS, "the dQ warp alone uses dq_desc")
    slot = read_slot(
        pointers.cu_seqlens_q, pointers.cu_seqlens_k, pointers.tiles, TILE.heads_kv, TILE.block_n
    )
    length_q = slot.length_q
    length_k = slot.length_k
    if pointers.logit_scale is not None:
        scale *= gl.load(pointers.logit_scale + gl.maximum(slot.document, 0))
    end = length_k
    if RELATION != INTRA:
        end = chunk_begin(length_k - 1, chunk_length)
    # An empty slot of the schedule has no queries, and no keys to store.
    end = gl.where(slot.document < 0, 0, end)
    last = gl.minimum(slot.first + TILE.block_n, end) - 1
    run, blocks = blocks_of_relation(
        slot.first, last, chunk_length, succ_length, length_q, length_k, RELATION, BLOCK_M
    )
    blocks = gl.where(slot.first < end, blocks, 0)

    vector_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    n_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF, BLOCK_D], dtype)
    m_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, BLOCK_D], dtype)
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF, BLOCK_M], dtype)
    k_bufs = gl.allocate_shared_memory(dtype, [2, HALF, BLOCK_D], n_layout)
    v_bufs = gl.allocate_shared_memory(dtype, [2, HALF, BLOCK_D], n_layout)
    q_bufs = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_D], m_layout)
    do_bufs = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_D], m_layout)
    ds_bufs = gl.allocate_shared_memory(
        dtype, [8 if FROM_REGISTERS else 4, HALF, BLOCK_M], ds_layout
    )
    if FROM_REGISTERS:
        slab = (slot.head_kv * TILE.group).to(gl.int64) * per_head
        slab += slot.begin_q // TILE.slab_rows + gl.maximum(slot.document, 0)
        dq_out = DqSlabs(pointers.dq_sum + slab * (TILE.slab_rows * TILE.head_dim), per_head)
    else:
        dq_out = allocate_partial_dq(BLOCK_M, BLOCK_D // 2)
    lse_bufs = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], vector_layout)
    delta_bufs = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], vector_layout)
    kv_ready = gl.allocate_shared_memory(gl.int64, [1], bar)
    q_ready, dout_ready = allocate_query_bars(STAGES)
    mbarrier.init(kv_ready, count=1)
    shared = BackwardBuffers(
        k_bufs, v_bufs, q_bufs, do_bufs, lse_bufs, delta_bufs, kv_ready, q_ready, dout_ready
    )
    tile = ChunkTile(
        slot.head_kv,
        slot.begin_q,
        length_q,
        slot.begin_k,
        end,
        length_k,
        slot.first,
        run,
        blocks,
    )
    results = ResultPointers(pointers.dk, pointers.dv, pointers.dk_sum, pointers.dv_sum)
    stats = Statistics(pointers.stats, None, total_q)
    inputs = BackwardInputs(
        shared, dq_out, ds_bufs, results, strides, tile, chunk_length, succ_length
    )
    if FROM_REGISTERS:
        gl.warp_specialize(
            [
                (
                    compute,
                    (inputs, scale, TILE, RELATION, FULL_WEIGHTS, 0),
                ),
                (
                    compute,
                    (inputs, scale, TILE, RELATION, FULL_WEIGHTS, 1),
                ),
                (_load, (q_desc, do_desc, k_desc, v_desc, shared, stats, tile, TILE, RELATION)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [
                (
                    compute,
                    (inputs, scale, TILE, RELATION, FULL_WEIGHTS, 0),
                ),
                (
                    compute,
                    (inputs, scale, TILE, RELATION, FULL_WEIGHTS, 1),
                ),
                (_load, (q_desc, do_desc, k_desc, v_desc, shared, stats, tile, TILE, RELATION)),
                (_add_partial_dq, (dq_desc, dq_out, tile, TILE, RELATION)),
            ],
            [4, 1, 1],
            [240, 24, 24],
        )
