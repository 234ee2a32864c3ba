"""Backward of dual chunk attention for Hopper, in Gluon: one launch per range of keys.

ranges.py defines the ranges; a chunk has c tokens. SUCC multiplies keys rotated by -c, INTRA
unrotated queries and keys, INTER queries rotated to the inter position.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from lctrain_kernels.dual_chunk.hopper_ranges import chunk_begin, queries_of_tile
from lctrain_kernels.dual_chunk.hopper_structures import (
    BackwardInputs,
    BackwardPointers,
    BackwardStrides,
    ChunkTile,
    QueryRun,
    ResultPointers,
)
from lctrain_kernels.dual_chunk.ranges import INTER, INTRA, SUCC
from lctrain_kernels.gluon.backward_pipeline import (
    acquire_partial_dq,
    allocate_partial_dq,
    allocate_query_bars,
    drain_partial_dq,
    key_offsets,
    load_rows,
    next_block,
    read_slot,
    release_partial_dq,
    start_dq,
    store_partial_dq,
)
from lctrain_kernels.gluon.barriers import (
    CONSUMERS,
    DOUT_EMPTY,
    DS_FULL,
    DUAL_CHUNK_BWD_STAGES,
    PRODUCER_AND_CONSUMERS,
    Q_EMPTY,
    acquire_stage,
    barrier_wait,
    drain_stages,
    release_stage,
)
from lctrain_kernels.gluon.compat import copy_arrive, copy_async, tma_add
from lctrain_kernels.gluon.coordinates import RAGGED, OutputKeys, Rows
from lctrain_kernels.gluon.forward_pipeline import load_block
from lctrain_kernels.gluon.primitives import rematerialised
from lctrain_kernels.gluon.structures import BackwardBuffers, Statistics
from lctrain_kernels.tile.logits import LOG2_E

_LOG2_E = gl.constexpr(LOG2_E)


@gluon.jit
def _range_of_relation(
    first,
    last,
    chunk_length,
    succ_length,
    length_q,
    length_k,
    RELATION: gl.constexpr,
    BLOCK_M: gl.constexpr,
):
    """Returns (first query that sees keys [first, last] in one range, number of query blocks)."""
    low, _, _, high = queries_of_tile(first, last, RELATION, chunk_length, succ_length, length_k)
    shift = length_k - length_q
    low = gl.maximum(low - shift, 0)
    high = gl.minimum(high - shift, length_q)
    return low, (gl.maximum(high - low, 0) + BLOCK_M - 1) // BLOCK_M


@gluon.jit
def _blocks_of_relation(
    first,
    last,
    chunk_length,
    succ_length,
    length_q,
    length_k,
    RELATION: gl.constexpr,
    BLOCK_M: gl.constexpr,
):
    """Returns (QueryRun of the queries that see keys [first, last] in a range, its block count)."""
    low, blocks = _range_of_relation(
        first, last, chunk_length, succ_length, length_q, length_k, RELATION, BLOCK_M
    )
    first_after_gap = blocks
    gap = 0
    if RELATION == SUCC:
        # Keys of two chunks have two separate runs of SUCC queries.
        _, blocks_1 = _range_of_relation(
            first, first, chunk_length, succ_length, length_q, length_k, RELATION, BLOCK_M
        )
        low_2, blocks_2 = _range_of_relation(
            last, last, chunk_length, succ_length, length_q, length_k, RELATION, BLOCK_M
        )
        between = low_2 - (low + blocks_1 * BLOCK_M)
        chunks = chunk_begin(last, chunk_length) - chunk_begin(first, chunk_length)
        apart = (chunks == chunk_length) & (between >= 0)
        first_after_gap = gl.where(apart, blocks_1, blocks)
        gap = gl.where(apart, between, 0)
        blocks = gl.where(apart, blocks_1 + blocks_2, blocks)
    return QueryRun(low, first_after_gap, gap), blocks


@gluon.jit
def _first_query(block, run, BLOCK_M: gl.constexpr):
    """Returns the position in the document of the first query of block number `block` of a run.

    Blocks are consecutive, except for the gap before block run.first_after_gap.
    """
    return run.low + block * BLOCK_M + gl.where(block < run.first_after_gap, 0, run.gap)


@gluon.jit
def _clear_blocks(
    first_key,
    keys: gl.constexpr,
    tile,
    chunk_length,
    succ_length,
    RELATION: gl.constexpr,
    BLOCK_M: gl.constexpr,
):
    """Returns (begin, end): query blocks [begin, end) see keys [first_key, first_key + keys)."""
    last_key = gl.minimum(first_key + keys, tile.end) - 1
    _, clear_low, clear_high, _ = queries_of_tile(
        first_key, last_key, RELATION, chunk_length, succ_length, tile.length_k
    )
    before = tile.length_k - tile.length_q + tile.run.low
    begin = gl.maximum(clear_low - before + BLOCK_M - 1, 0) // BLOCK_M
    clear_end = tile.blocks
    if RELATION != INTER:
        clear_end = gl.minimum(
            gl.maximum(clear_high - before, 0) // BLOCK_M, tile.run.first_after_gap
        )
    return gl.where(first_key + keys > tile.end, tile.blocks, begin), clear_end


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
        first_query = _first_query(block, tile.run, BLOCK_M)
        query = first_query + local
        vector = (head.to(gl.int64) * stats.total_q + tile.begin_q + query) * 4
        queries = Rows(tile.begin_q + tile.length_q, RAGGED - tile.length_q + first_query, head)
        acquire_stage(Q_EMPTY, step, STAGES, PRODUCER_AND_CONSUMERS)
        copy_async(shared.lse.index(stage), stats.lse + vector, mask=query < tile.length_q)
        copy_arrive(shared.q_ready.index(stage))
        load_block(q_desc, shared.q.index(stage), shared.q_ready.index(stage), queries)
        acquire_stage(DOUT_EMPTY, step, STAGES, PRODUCER_AND_CONSUMERS)
        copy_async(shared.delta.index(stage), stats.lse + vector + 1, mask=query < tile.length_q)
        copy_arrive(shared.dout_ready.index(stage))
        load_block(do_desc, shared.dout.index(stage), shared.dout_ready.index(stage), queries)
        head, block = next_block(head, block, tile.head_kv, GROUP)
    drain_stages(Q_EMPTY, steps, STAGES, PRODUCER_AND_CONSUMERS)
    drain_stages(DOUT_EMPTY, steps, STAGES, PRODUCER_AND_CONSUMERS)


@gluon.jit
def _add_partial_dq(dq_desc, dq_bufs, tile, TILE: gl.constexpr):
    """Runs the dQ warp, which adds partial dq from shared memory to the float32 buffer."""
    GROUP: gl.constexpr = TILE.group
    COLUMNS: gl.constexpr = TILE.block_d // 2
    head = tile.head_kv * GROUP
    block = tile.blocks - 1
    for _ in range(GROUP * tile.blocks):
        row = RAGGED - tile.length_q + _first_query(block, tile.run, TILE.block_m)
        for half in gl.static_range(2):
            dq_half = acquire_partial_dq(dq_bufs, half, dq_desc)
            coordinates = [RAGGED, tile.begin_q + tile.length_q, row, head, half * COLUMNS]
            tma_add(dq_desc, coordinates, dq_half)
        release_partial_dq()
        head, block = next_block(head, block, tile.head_kv, GROUP)


@gluon.jit
def _compute(
    inputs,
    chunk_length,
    succ_length,
    scale,
    TILE: gl.constexpr,
    RELATION: gl.constexpr,
    HALF_INDEX: gl.constexpr,
):
    """Runs a consumer warpgroup: dk, dv of half of the tile's keys, half of the columns of dq."""
    shared = inputs.shared
    dq_bufs = inputs.dq
    ds_bufs = inputs.ds
    pointers = inputs.results
    strides = inputs.strides
    tile = inputs.tile
    end = tile.end
    length_k = tile.length_k
    blocks = tile.blocks
    GROUP: gl.constexpr = TILE.group
    BLOCK_M: gl.constexpr = TILE.block_m
    BLOCK_D: gl.constexpr = TILE.block_d
    STAGES: gl.constexpr = TILE.stages
    HALF: gl.constexpr = TILE.block_n // 2
    COLUMNS: gl.constexpr = BLOCK_D // 2
    dtype: gl.constexpr = shared.k.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    TRANSPOSED: gl.constexpr = COLUMNS == 64
    DQ_ROWS: gl.constexpr = COLUMNS if TRANSPOSED else BLOCK_M
    DQ_COLUMNS: gl.constexpr = BLOCK_M if TRANSPOSED else COLUMNS
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DQ_COLUMNS, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    column_s: gl.constexpr = gl.SliceLayout(0, s_layout)

    first_key = tile.first + HALF_INDEX * HALF
    local_key = gl.arange(0, HALF, gl.SliceLayout(1, s_layout))
    local_query = gl.arange(0, BLOCK_M, column_s)
    shift = length_k - tile.length_q
    clear_first, clear_end = _clear_blocks(
        first_key, HALF, tile, chunk_length, succ_length, RELATION, BLOCK_M
    )
    multiplier = scale * _LOG2_E
    dk = gl.zeros([HALF, BLOCK_D], gl.float32, o_layout)
    dv = gl.zeros([HALF, BLOCK_D], gl.float32, o_layout)
    zero_s = gl.zeros([HALF, BLOCK_M], gl.float32, s_layout)
    zero_q = gl.zeros([DQ_ROWS, DQ_COLUMNS], gl.float32, dq_layout)
    steps = GROUP * blocks
    mbarrier.wait(shared.kv_ready, 0)
    for step in range(steps):
        stage = step % STAGES
        phase = (step // STAGES) & 1
        block = blocks - 1 - step // GROUP  # in the order of next_block
        opaque_false = block < 0
        mbarrier.wait(shared.q_ready.index(stage), phase)
        s_token = warpgroup_mma(
            rematerialised(shared.k, HALF_INDEX, opaque_false),
            shared.q.index(stage).permute((1, 0)),
            zero_s,
            use_acc=False,
            is_async=True,
        )
        mbarrier.wait(shared.dout_ready.index(stage), phase)
        dp_token = warpgroup_mma(
            rematerialised(shared.v, HALF_INDEX, opaque_false),
            shared.dout.index(stage).permute((1, 0)),
            zero_s,
            use_acc=False,
            is_async=True,
        )
        lse = shared.lse.index(stage).load(column_s)
        s = warpgroup_mma_wait(1, deps=[s_token])
        # Keys beyond the end are zero, and 2^(0 - lse) may overflow.
        if (block < clear_first) | (block >= clear_end):
            # In queries: the position of the first key, and the end of each key's chunk. Before the
            # loop they would take registers.
            key = first_key + gl.where(opaque_false, 1, 0)
            diagonal = key - shift
            chunk_end = chunk_begin(key + local_key, chunk_length) + chunk_length - shift
            query = local_query + _first_query(block, tile.run, BLOCK_M)
            first_seen = chunk_end
            if RELATION == INTRA:
                first_seen = local_key + diagonal
            if RELATION == INTER:
                first_seen += succ_length
            first_seen = gl.where(local_key < end - key, first_seen, tile.length_q)
            s = gl.where(query[None, :] >= first_seen[:, None], s, float("-inf"))
            if RELATION != INTER:
                seen_end = chunk_end + succ_length if RELATION == SUCC else chunk_end
                s = gl.where(query[None, :] < seen_end[:, None], s, float("-inf"))
        p = gl.exp2(s * multiplier - lse[None, :])
        # Until dp is there, the weights are kept as the product takes them: half the registers.
        p = p.to(dtype)
        p_operand = gl.convert_layout(p, p_layout)
        delta = shared.delta.index(stage).load(column_s)
        # A scheduling fence that never runs: ptxas does not move the next wait above it.
        barrier_wait(DS_FULL, CONSUMERS, 4, gl.where(opaque_false, 1, 0))
        dp = warpgroup_mma_wait(0, deps=[dp_token])
        dv_token = warpgroup_mma(p_operand, shared.dout.index(stage), dv, is_async=True)
        ds = (p.to(gl.float32) * (dp - delta[None, :])).to(dtype)
        ds_operand = gl.convert_layout(ds, p_layout)
        # Two buffers: the half that is written now was read two steps ago, before both warpgroups
        # synchronised at DS_FULL.
        buffer = step & 1
        ds_bufs.index(buffer * 2 + HALF_INDEX).store(ds)
        fence_async_shared()
        barrier_wait(DS_FULL, CONSUMERS, 4)
        dq_token = start_dq(ds_bufs, shared.k, buffer, zero_q, opaque_false, HALF_INDEX, TRANSPOSED)
        dk_token = warpgroup_mma(ds_operand, shared.q.index(stage), dk, is_async=True)
        dv = warpgroup_mma_wait(3, deps=[dv_token])
        release_stage(DOUT_EMPTY, stage, PRODUCER_AND_CONSUMERS)
        dq = warpgroup_mma_wait(1, deps=[dq_token])
        store_partial_dq(dq, dq_bufs, step, HALF_INDEX, TRANSPOSED)
        dk = warpgroup_mma_wait(0, deps=[dk_token])
        release_stage(Q_EMPTY, stage, PRODUCER_AND_CONSUMERS)
    drain_partial_dq(steps, HALF_INDEX)
    keys = OutputKeys(first_key, end, tile.begin_k, tile.head_kv)
    offsets, inside = key_offsets(
        keys, strides.token, strides.head, TILE.head_dim, o_layout, HALF, BLOCK_D
    )
    # Keys of all chunks but the document's last one, to whose gradients other launches add.
    keys = OutputKeys(
        first_key, chunk_begin(length_k - 1, chunk_length), tile.begin_k, tile.head_kv
    )
    _, is_shared = key_offsets(
        keys, strides.token, strides.head, TILE.head_dim, o_layout, HALF, BLOCK_D
    )
    is_shared = is_shared & inside
    if RELATION != SUCC:
        has_sum = is_shared
        if RELATION == INTRA:
            has_sum = is_shared & (succ_length > 0)
        dv += gl.load(pointers.dv_sum + offsets, mask=has_sum, other=0.0)
        dk += gl.load(pointers.dk_sum + offsets, mask=has_sum, other=0.0)
    if RELATION != INTER:
        gl.store(pointers.dv_sum + offsets, dv, mask=is_shared)
        gl.store(pointers.dk_sum + offsets, dk, mask=is_shared)
    if RELATION == INTRA:
        inside = inside & ~is_shared
    if RELATION != SUCC:
        gl.store(pointers.dv + offsets, dv.to(dtype), mask=inside)
        gl.store(pointers.dk + offsets, (dk * scale).to(dtype), mask=inside)


@gluon.jit(do_not_specialize=["total_q", "chunk_length", "succ_length"])
def dual_chunk_bwd_hopper_kernel(
    q_desc,
    do_desc,
    k_desc,
    v_desc,
    dq_desc,
    pointers: BackwardPointers,
    strides: BackwardStrides,
    total_q,
    chunk_length,
    succ_length,
    scale,
    TILE: gl.constexpr,
    RELATION: gl.constexpr,
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
    rotated to the inter position before INTER. gluon/structures.py describes other arguments.
    """
    dtype: gl.constexpr = q_desc.dtype
    BLOCK_M: gl.constexpr = TILE.block_m
    BLOCK_D: gl.constexpr = TILE.block_d
    STAGES: gl.constexpr = TILE.stages
    HALF: gl.constexpr = TILE.block_n // 2
    gl.static_assert(TILE.stages <= DUAL_CHUNK_BWD_STAGES, "named barriers overlap")
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
    run, blocks = _blocks_of_relation(
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
    ds_bufs = gl.allocate_shared_memory(dtype, [4, HALF, BLOCK_M], ds_layout)
    dq_bufs = allocate_partial_dq(BLOCK_M, BLOCK_D // 2)
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
    inputs = BackwardInputs(shared, dq_bufs, ds_bufs, results, strides, tile)
    gl.warp_specialize(
        [
            (_compute, (inputs, chunk_length, succ_length, scale, TILE, RELATION, 0)),
            (_compute, (inputs, chunk_length, succ_length, scale, TILE, RELATION, 1)),
            (_load, (q_desc, do_desc, k_desc, v_desc, shared, stats, tile, TILE)),
            (_add_partial_dq, (dq_desc, dq_bufs, tile, TILE)),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )
