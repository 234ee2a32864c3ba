"""Backward of differential attention for Hopper, in Gluon: one kernel for both branches.

The branches share dP = v dout^T and dV. A program computes dk1, dk2 and dv of one tile of keys. It
adds its partial dq1 and dq2 to float32 buffers in global memory.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from lctrain_kernels.differential.hopper_bwd_warps import (
    DQ_COLUMNS,
    add_partial_dq,
    load,
)
from lctrain_kernels.differential.hopper_structures import (
    BackwardInputs,
    BackwardPointers,
    BackwardStrides,
    ResultPointers,
)
from lctrain_kernels.gluon.backward_pipeline import (
    allocate_partial_dq,
    allocate_query_bars,
    drain_partial_dq,
    key_offsets,
    keys_weights,
    read_slot,
    store_partial_dq,
)
from lctrain_kernels.gluon.barriers import (
    CONSUMERS,
    DIFFERENTIAL_BWD_STAGES,
    DOUT_EMPTY,
    DS_FULL,
    DS_READ_0,
    DS_READ_1,
    PRODUCER_AND_CONSUMERS,
    Q_EMPTY,
    barrier_arrive,
    barrier_wait,
    release_stage,
)
from lctrain_kernels.gluon.compat import partition_barrier
from lctrain_kernels.gluon.coordinates import Bounds, KeyBounds, OutputKeys
from lctrain_kernels.gluon.primitives import load_window, query_blocks, rematerialised
from lctrain_kernels.gluon.structures import (
    BackwardBuffers,
    DqSlabs,
    KeyTile,
    Statistics,
    Visit,
)
from lctrain_kernels.tile.logits import LOG2_E
from lctrain_kernels.varlen.hopper_bwd_dq import add_dq_of_step, first_slab

_LOG2_E = gl.constexpr(LOG2_E)


@gluon.jit
def _compute(
    inputs,
    TILE: gl.constexpr,
    FLAGS: gl.constexpr,
    HALF_INDEX: gl.constexpr,
):
    """Runs a consumer warpgroup: dk, dv of half of the tile's keys, partial dq of one branch.

    Both warpgroups compute dS of both branches for their keys, and exchange it through shared
    memory.
    """
    shared = inputs.shared
    dq_out = inputs.dq
    ds_bufs = inputs.ds
    results = inputs.results
    strides = inputs.strides
    tile = inputs.tile
    scale = inputs.scale
    low = tile.low
    high = tile.high
    GROUP: gl.constexpr = TILE.group
    BLOCK_M: gl.constexpr = TILE.block_m
    BLOCK_D: gl.constexpr = TILE.block_d
    BLOCK_DV: gl.constexpr = TILE.block_dv
    STAGES: gl.constexpr = TILE.stages
    NUM_K: gl.constexpr = TILE.num_k
    HALF: gl.constexpr = TILE.block_n // 2
    ROUNDS: gl.constexpr = BLOCK_D // DQ_COLUMNS
    OWN_READ: gl.constexpr = DS_READ_0 if HALF_INDEX == 0 else DS_READ_1
    OTHER_READ: gl.constexpr = DS_READ_1 if HALF_INDEX == 0 else DS_READ_0
    OWN_K: gl.constexpr = 2 * (NUM_K - 1) * HALF_INDEX  # of the branch whose dq is computed here
    dtype: gl.constexpr = shared.v.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    k_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    v_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_DV, 16])
    FROM_REGISTERS: gl.constexpr = TILE.dq_from_registers
    # The store to shared memory then has no bank conflicts.
    TRANSPOSED: gl.constexpr = BLOCK_D == 64 and not FROM_REGISTERS
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [4, 1], [16, BLOCK_M if TRANSPOSED else BLOCK_D, 16]
    )
    ds_layout: gl.constexpr = gl.DotOperandLayout(0, k_layout, 2)
    p_layout: gl.constexpr = gl.DotOperandLayout(0, v_layout, 2)
    column_s: gl.constexpr = gl.SliceLayout(0, s_layout)

    first_key = tile.first + HALF_INDEX * HALF
    keys_here = tile.length_k - first_key
    bounds = KeyBounds(
        keys_here,
        keys_here - tile.length_q + inputs.window.right,
        keys_here - tile.length_q - inputs.window.left,
    )
    multiplier = scale * _LOG2_E
    dk1 = gl.zeros([HALF, BLOCK_D], gl.float32, k_layout)
    dk2 = gl.zeros([HALF, BLOCK_D], gl.float32, k_layout)
    dv = gl.zeros([HALF, BLOCK_DV], gl.float32, v_layout)
    zero_s = gl.zeros([HALF, BLOCK_M], gl.float32, s_layout)
    zero_q = gl.zeros(
        [BLOCK_D, BLOCK_M] if TRANSPOSED else [BLOCK_M, BLOCK_D], gl.float32, dq_layout
    )
    steps = GROUP * (high - low)
    if FROM_REGISTERS:
        # The heads of branch 2 follow those of branch 1.
        heads: gl.constexpr = HALF_INDEX * TILE.heads_kv * GROUP * TILE.slab_rows * TILE.head_dim
        slabs = DqSlabs(dq_out.pointer + dq_out.per_head.to(gl.int64) * heads, dq_out.per_head)
    mbarrier.wait(shared.kv_ready, 0)
    for step in range(steps):
        stage = step % STAGES
        phase = (step // STAGES) & 1
        block = high - 1 - step // GROUP  # in the order of next_block
        query = block * BLOCK_M
        opaque_false = block < low
        # From registers, dS has two sets of buffers: a warpgroup writes one that the other has read
        # before both synchronised at DS_FULL. Otherwise DS_READ says when the one set is read.
        ds_set = 4 * (step & 1) if FROM_REGISTERS else 0
        k1 = rematerialised(shared.k, HALF_INDEX, opaque_false)
        k2 = rematerialised(shared.k, 2 * (NUM_K - 1) + HALF_INDEX, opaque_false)
        v = rematerialised(shared.v, HALF_INDEX, opaque_false)
        q1 = shared.q.index(2 * stage)
        q2 = shared.q.index(2 * stage + 1)
        do = shared.dout.index(stage)
        mbarrier.wait(shared.q_ready.index(stage), phase)
        s1_token = warpgroup_mma(k1, q1.permute((1, 0)), zero_s, use_acc=False, is_async=True)
        mbarrier.wait(shared.dout_ready.index(stage), phase)
        dp_token = warpgroup_mma(v, do.permute((1, 0)), zero_s, use_acc=False, is_async=True)
        s1 = warpgroup_mma_wait(1, deps=[s1_token])
        lse = shared.lse.index(2 * stage).load(column_s)
        p1 = keys_weights(s1, lse, query, bounds, multiplier, BLOCK_M, s_layout, FLAGS)
        if not FROM_REGISTERS:
            # The other warpgroup has read the last step's ds, too.
            barrier_wait(OTHER_READ, CONSUMERS, 4, gl.where(step > 0, 1, 0))
        # Registers do not hold both branches' weights, so p1 waits in the buffer of ds2. The store
        # before the wait for dp also makes the compiler compute p1 before it.
        ds_bufs.index(ds_set + 2 + HALF_INDEX).store(p1.to(dtype))
        dp = warpgroup_mma_wait(0, deps=[dp_token])
        e1 = shared.delta.index(2 * stage).load(column_s)
        ds1 = (p1 * (dp - e1[None, :])).to(dtype)
        ds_bufs.index(ds_set + HALF_INDEX).store(ds1)
        fence_async_shared()
        partition_barrier()
        s2_token = warpgroup_mma(k2, q2.permute((1, 0)), zero_s, use_acc=False, is_async=True)
        ds1_buf = rematerialised(ds_bufs, ds_set + HALF_INDEX, opaque_false)
        dk1_token = warpgroup_mma(ds1_buf, q1, dk1, is_async=True)
        s2 = warpgroup_mma_wait(1, deps=[s2_token])
        lse = shared.lse.index(2 * stage + 1).load(column_s)
        p2 = keys_weights(s2, lse, query, bounds, multiplier, BLOCK_M, s_layout, FLAGS)
        e2 = shared.delta.index(2 * stage + 1).load(column_s)
        sign = e2.to(gl.int32, bitcast=True) << 31
        p2 = (p2.to(gl.int32, bitcast=True) ^ sign[None, :]).to(gl.float32, bitcast=True)
        ds2 = (p2 * (e2[None, :] - dp)).to(dtype)
        p1 = ds_bufs.index(ds_set + 2 + HALF_INDEX).load(s_layout).to(gl.float32)
        p = (p1 - p2).to(dtype)
        ds_bufs.index(ds_set + 2 + HALF_INDEX).store(ds2)
        fence_async_shared()
        dv_token = warpgroup_mma(gl.convert_layout(p, p_layout), do, dv, is_async=True)
        dk1 = warpgroup_mma_wait(1, deps=[dk1_token])
        barrier_wait(DS_FULL, CONSUMERS, 4)
        dq_token = zero_q
        for half in gl.static_range(2):
            ds = rematerialised(ds_bufs, ds_set + 2 * HALF_INDEX + half, opaque_false)
            k = rematerialised(shared.k, OWN_K + half, opaque_false)
            if TRANSPOSED:
                dq_token = warpgroup_mma(
                    k.permute((1, 0)), ds, dq_token, use_acc=half > 0, is_async=True
                )
            else:
                dq_token = warpgroup_mma(
                    ds.permute((1, 0)), k, dq_token, use_acc=half > 0, is_async=True
                )
        if NUM_K == 1:
            ds2_buf = rematerialised(ds_bufs, ds_set + 2 + HALF_INDEX, opaque_false)
            dk1_token = warpgroup_mma(ds2_buf, q2, dk1, is_async=True)
        else:
            dk2_token = warpgroup_mma(gl.convert_layout(ds2, ds_layout), q2, dk2, is_async=True)
        dv = warpgroup_mma_wait(3, deps=[dv_token])
        release_stage(DOUT_EMPTY, stage, PRODUCER_AND_CONSUMERS)
        dq = warpgroup_mma_wait(1, deps=[dq_token])
        if FROM_REGISTERS:
            add_dq_of_step(dq, slabs, Visit(step % GROUP, block), tile, True, 0, 0, TILE)
        else:
            if ROUNDS == 2:
                # The buffer holds 64 columns.
                halves = gl.permute(gl.reshape(dq, [BLOCK_M, 2, DQ_COLUMNS]), (0, 2, 1))
                dq, dq_late = gl.split(halves)
            store_partial_dq(dq, dq_out, step * ROUNDS, HALF_INDEX, TRANSPOSED)
        if NUM_K == 1:
            dk1 = warpgroup_mma_wait(0, deps=[dk1_token])
        else:
            dk2 = warpgroup_mma_wait(0, deps=[dk2_token])
        release_stage(Q_EMPTY, stage, PRODUCER_AND_CONSUMERS)
        if not FROM_REGISTERS:
            barrier_arrive(OWN_READ, CONSUMERS, 4)
            if ROUNDS == 2:
                store_partial_dq(dq_late, dq_out, step * ROUNDS + 1, HALF_INDEX, TRANSPOSED)
    if not FROM_REGISTERS:
        barrier_wait(OTHER_READ, CONSUMERS, 4, gl.where(steps > 0, 1, 0))
        drain_partial_dq(steps, HALF_INDEX)
    keys = OutputKeys(first_key, tile.length_k, tile.begin_k, tile.head_kv)
    offsets_v, inside_v = key_offsets(
        keys, strides.v_token, strides.v_head, TILE.value_dim, v_layout, HALF, BLOCK_DV
    )
    gl.store(results.dv + offsets_v, dv.to(dtype), mask=inside_v)
    offsets_k, inside = key_offsets(
        keys, strides.k_token, strides.k_head, TILE.head_dim, k_layout, HALF, BLOCK_D
    )
    gl.store(results.dk1 + offsets_k, (dk1 * scale).to(dtype), mask=inside)
    if NUM_K == 2:
        gl.store(results.dk2 + offsets_k, (dk2 * scale).to(dtype), mask=inside)


@gluon.jit(do_not_specialize=["per_head", "total_q", "window_left", "window_right"])
def differential_bwd_hopper_kernel(
    q1_desc,
    q2_desc,
    do_desc,
    k1_desc,
    k2_desc,
    v_desc,
    dq1_desc,
    dq2_desc,
    pointers: BackwardPointers,
    per_head,
    strides: BackwardStrides,
    total_q,
    window_left,
    window_right,
    scale,
    TILE: gl.constexpr,
    FLAGS: gl.constexpr,
):
    """Computes dk1, dk2 and dv of a tile of keys, and adds its dq1 and dq2 to float32 buffers.

    A program processes one tile of keys of one key/value head, and all queries of the head's group
    that see it. Grid: (tiles * key/value heads,).

    differential_prepare_kernel writes stats [4, H, T] float32: base-2 lse1 (+inf for a query that
    saw no key), lse2 - log2 |lam|, e1, and e2 with the sign of lam in its last bit; its docstring
    defines e1 and e2. So p1 = A1 and p2 = lam A2 here, with the attention weights A1 and A2. With
    dp = dout v^T, the gradients of the logits are ds1 = p1 (dp - e1) and ds2 = p2 (e2 - dp).

    dq1_desc and dq2_desc describe float32 buffers [T, H, D], zero at launch. With
    TILE.dq_from_registers both are None, and pointers.dq_sum holds the buffers of both branches,
    zero at launch, in slabs of 16 queries: varlen's first_slab describes them. per_head is the
    number of slabs of a head of one branch.

    If both branches read k1, k2_desc and dk2 are None and dk1 is the sum of both gradients.

    gluon/structures.py describes the arguments that are not named here.
    """
    dtype: gl.constexpr = v_desc.dtype
    BLOCK_M: gl.constexpr = TILE.block_m
    BLOCK_D: gl.constexpr = TILE.block_d
    BLOCK_DV: gl.constexpr = TILE.block_dv
    STAGES: gl.constexpr = TILE.stages
    NUM_K: gl.constexpr = TILE.num_k
    HALF: gl.constexpr = TILE.block_n // 2
    gl.static_assert(TILE.stages <= DIFFERENTIAL_BWD_STAGES, "named barriers overlap")
    slot = read_slot(
        pointers.cu_seqlens_q, pointers.cu_seqlens_k, pointers.tiles, TILE.heads_kv, TILE.block_n
    )
    left, right = load_window(pointers.window, window_left, window_right)
    low, high = query_blocks(
        slot.first,
        TILE.block_n,
        slot.length_k - slot.length_q,
        slot.length_q,
        left,
        right,
        FLAGS.has_left,
        FLAGS.has_right,
        BLOCK_M,
    )
    # An empty slot of the schedule has no queries, and no keys to store.
    high = gl.where(slot.document < 0, low, high)
    length_k = gl.where(slot.document < 0, 0, slot.length_k)

    vector_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    k_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF, BLOCK_D], dtype)
    v_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF, BLOCK_DV], dtype)
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, BLOCK_D], dtype)
    do_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, BLOCK_DV], dtype)
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF, BLOCK_M], dtype)
    k_bufs = gl.allocate_shared_memory(dtype, [2 * NUM_K, HALF, BLOCK_D], k_layout)
    v_bufs = gl.allocate_shared_memory(dtype, [2, HALF, BLOCK_DV], v_layout)
    q_bufs = gl.allocate_shared_memory(dtype, [2 * STAGES, BLOCK_M, BLOCK_D], q_layout)
    do_bufs = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_DV], do_layout)
    FROM_REGISTERS: gl.constexpr = TILE.dq_from_registers
    gl.static_assert((dq1_desc is None) == FROM_REGISTERS, "the dQ warp alone uses dq1_desc")
    DS_BUFFERS: gl.constexpr = 8 if FROM_REGISTERS else 4
    ds_bufs = gl.allocate_shared_memory(dtype, [DS_BUFFERS, HALF, BLOCK_M], ds_layout)
    lse_bufs = gl.allocate_shared_memory(gl.float32, [2 * STAGES, BLOCK_M], vector_layout)
    delta_bufs = gl.allocate_shared_memory(gl.float32, [2 * STAGES, BLOCK_M], vector_layout)
    kv_ready = gl.allocate_shared_memory(gl.int64, [1], bar)
    q_ready, dout_ready = allocate_query_bars(STAGES)
    mbarrier.init(kv_ready, count=1)
    shared = BackwardBuffers(
        k_bufs, v_bufs, q_bufs, do_bufs, lse_bufs, delta_bufs, kv_ready, q_ready, dout_ready
    )
    tile = KeyTile(
        slot.head_kv,
        slot.begin_q,
        slot.length_q,
        slot.begin_k,
        length_k,
        slot.first,
        low,
        high,
    )
    if FROM_REGISTERS:
        document = gl.maximum(slot.document, 0)
        dq_out = DqSlabs(first_slab(pointers.dq_sum, per_head, tile, document, TILE), per_head)
    else:
        dq_out = allocate_partial_dq(BLOCK_M, DQ_COLUMNS)
    results = ResultPointers(pointers.dk1, pointers.dk2, pointers.dv)
    stats = Statistics(pointers.stats, None, total_q)
    stats_size = total_q.to(gl.int64) * (TILE.heads_kv * TILE.group)
    window = Bounds(left, right)
    inputs = BackwardInputs(shared, dq_out, ds_bufs, results, strides, tile, window, scale)
    q_descs = (q1_desc, q2_desc)
    k_descs = (k1_desc, k2_desc)
    dq_descs = (dq1_desc, dq2_desc)
    if FROM_REGISTERS:
        gl.warp_specialize(
            [
                (_compute, (inputs, TILE, FLAGS, 0)),
                (_compute, (inputs, TILE, FLAGS, 1)),
                (
                    load,
                    (q_descs, do_desc, k_descs, v_desc, shared, stats, stats_size, tile, TILE),
                ),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_compute, (inputs, TILE, FLAGS, 0)),
                (_compute, (inputs, TILE, FLAGS, 1)),
                (
                    load,
                    (q_descs, do_desc, k_descs, v_desc, shared, stats, stats_size, tile, TILE),
                ),
                (add_partial_dq, (dq_descs, dq_out, tile, TILE)),
            ],
            [4, 1, 1],
            [240, 24, 24],
        )
