"""Backward of varlen attention for Hopper at head dims from 129 to 256, in Gluon.

A program computes dk and dv of a tile of 64 keys. Two consumer warpgroups have different products:
the first computes S, the weights and dv, the second dP, dS and dk. Each computes half of the
columns of partial dq and adds it to global memory from registers.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from lctrain_kernels.gluon.backward_pipeline import (
    allocate_query_bars,
    first_visit,
    key_offsets,
    next_visit,
)
from lctrain_kernels.gluon.barriers import (
    BLOCK_EMPTY,
    CONSUMERS,
    DS_FULL,
    P_READY,
    PRODUCER_AND_CONSUMERS,
    VARLEN_BWD_WIDE_STAGES,
    barrier_arrive,
    barrier_wait,
    release_stage,
)
from lctrain_kernels.gluon.coordinates import Bounds, KeyBounds, OutputKeys
from lctrain_kernels.gluon.primitives import load_window, rematerialised
from lctrain_kernels.gluon.structures import (
    BackwardBuffers,
    DqSlabs,
    DropoutInputs,
    Factors,
    KeyGradients,
    Statistics,
)
from lctrain_kernels.varlen.hopper_bwd import (
    BackwardPointers,
    BackwardStrides,
    load_tensors,
    locate,
)
from lctrain_kernels.varlen.hopper_bwd_compute import ComputeInputs, block_weights
from lctrain_kernels.varlen.hopper_bwd_dq import add_dq_of_step, first_slab
from lctrain_kernels.varlen.hopper_bwd_products import (
    draw_block_bits,
    gradient_of_logits,
    kept_weights,
    seed_words,
)


@gluon.jit
def _start_dq(ds, k, zero_q, opaque_false, HALF_INDEX: gl.constexpr):
    """Issues the asynchronous product of half of the columns of partial dq = dS^T k.

    Args:
        ds: dS in shared memory, [1, keys, queries].
        k: Keys in shared memory, [1, keys, columns].
        zero_q: Accumulator of zeros, [queries, columns / 2] float32.
        opaque_false: Condition that is always false, but that the compiler cannot evaluate.
        HALF_INDEX: Half of the columns, 0 or 1.
    """
    COLUMNS: gl.constexpr = zero_q.shape[1]
    half = rematerialised(k, 0, opaque_false).slice(HALF_INDEX * COLUMNS, COLUMNS, dim=1)
    return warpgroup_mma(ds.index(0).permute((1, 0)), half, zero_q, use_acc=False, is_async=True)


@gluon.jit
def _weights_and_dv(
    inputs,
    weights,
    ds,
    TILE: gl.constexpr,
    FLAGS: gl.constexpr,
):
    """Runs the first consumer warpgroup, which computes S, the weights p, dv and half of dq.

    The second warpgroup reads p from shared memory. Its dS of a step shows that it has read the
    step's p, so the buffer of p needs no other signal.

    Args:
        inputs: Tensors, coordinates and factors, a ComputeInputs.
        weights: Shared memory of p, [1, keys, queries] in half precision.
        ds: Shared memory of dS, [1, keys, queries] in half precision.
        TILE: Tile sizes and head counts of the backward kernel, a BackwardShape.
        FLAGS: Features beyond plain attention, a tile.structures.Flags.
    """
    shared = inputs.shared
    tile = inputs.tile
    results = inputs.results
    GROUP: gl.constexpr = TILE.group
    BLOCK_M: gl.constexpr = TILE.block_m
    BLOCK_N: gl.constexpr = TILE.block_n
    BLOCK_D: gl.constexpr = TILE.block_d
    STAGES: gl.constexpr = TILE.stages
    dtype: gl.constexpr = shared.k.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D // 2, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    keys_here = tile.length_k - tile.first
    bounds = KeyBounds(
        keys_here,
        keys_here - tile.length_q + inputs.window.right,
        keys_here - tile.length_q - inputs.window.left,
    )
    zero_s = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, s_layout)
    zero_q = gl.zeros([BLOCK_M, BLOCK_D // 2], gl.float32, dq_layout)
    dv = gl.zeros([BLOCK_N, BLOCK_D], gl.float32, o_layout)
    dropout = inputs.dropout
    random = seed_words(dropout, FLAGS.has_dropout)
    visit = first_visit(tile, True)
    mbarrier.wait(shared.kv_ready, 0)
    for step in range(GROUP * (tile.high - tile.low)):
        stage = step % STAGES
        phase = (step // STAGES) & 1
        opaque_false = visit.block < 0
        mbarrier.wait(shared.q_ready.index(stage), phase)
        s = warpgroup_mma(
            rematerialised(shared.k, 0, opaque_false),
            shared.q.index(stage).permute((1, 0)),
            zero_s,
            use_acc=False,
            is_async=True,
        )
        lse = shared.lse.index(stage).load(gl.SliceLayout(0, s_layout))
        query = visit.block * BLOCK_M
        head = tile.head_kv * GROUP + visit.member
        bits = draw_block_bits(random, head, query, tile.first, s_layout, FLAGS.has_dropout)
        s = warpgroup_mma_wait(0, deps=[s])
        p, of_logits = block_weights(
            *(s, bits, lse, query, bounds, dropout.threshold, inputs.factors, opaque_false),
            dtype,
            s_layout,
            FLAGS,
        )
        weights.index(0).store(of_logits)
        barrier_arrive(P_READY, CONSUMERS, 4)
        mbarrier.wait(shared.dout_ready.index(stage), phase)
        seen = gl.convert_layout(kept_weights(p, FLAGS.has_dropout), p_layout)
        dv = warpgroup_mma(seen, shared.dout.index(stage), dv, is_async=True)
        barrier_wait(DS_FULL, CONSUMERS, 4)
        dq = _start_dq(ds, shared.k, zero_q, opaque_false, 0)
        dv = warpgroup_mma_wait(1, deps=[dv])
        release_stage(BLOCK_EMPTY, stage, PRODUCER_AND_CONSUMERS)
        dq = warpgroup_mma_wait(0, deps=[dq])
        add_dq_of_step(dq, inputs.dq_out, visit, tile, True, 0, 0, TILE)
        visit = next_visit(visit, tile, GROUP, True)
    keys = OutputKeys(tile.first, tile.length_k, tile.begin_k, tile.head_kv)
    offsets, inside = key_offsets(
        keys, results.token, results.head, TILE.head_dim, o_layout, BLOCK_N, BLOCK_D
    )
    gl.store(results.dv + offsets, (dv * inputs.factors.keep_scale).to(dtype), mask=inside)


@gluon.jit
def _gradients_and_dk(inputs, weights, ds, TILE: gl.constexpr, FLAGS: gl.constexpr):
    """Runs the second consumer warpgroup, which computes dP, dS, dk and half of dq.

    The first warpgroup stores p of the next step after its product of dq. So p shows that it has
    read dS, and the buffer of dS needs no other signal.

    The arguments are those of _weights_and_dv.
    """
    shared = inputs.shared
    tile = inputs.tile
    results = inputs.results
    GROUP: gl.constexpr = TILE.group
    BLOCK_M: gl.constexpr = TILE.block_m
    BLOCK_N: gl.constexpr = TILE.block_n
    BLOCK_D: gl.constexpr = TILE.block_d
    STAGES: gl.constexpr = TILE.stages
    dtype: gl.constexpr = shared.k.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D // 2, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    zero_s = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, s_layout)
    zero_q = gl.zeros([BLOCK_M, BLOCK_D // 2], gl.float32, dq_layout)
    dk = gl.zeros([BLOCK_N, BLOCK_D], gl.float32, o_layout)
    visit = first_visit(tile, True)
    mbarrier.wait(shared.kv_ready, 0)
    for step in range(GROUP * (tile.high - tile.low)):
        stage = step % STAGES
        phase = (step // STAGES) & 1
        opaque_false = visit.block < 0
        mbarrier.wait(shared.dout_ready.index(stage), phase)
        dp = warpgroup_mma(
            rematerialised(shared.v, 0, opaque_false),
            shared.dout.index(stage).permute((1, 0)),
            zero_s,
            use_acc=False,
            is_async=True,
        )
        mbarrier.wait(shared.q_ready.index(stage), phase)
        barrier_wait(P_READY, CONSUMERS, 4)
        p = weights.index(0).load(s_layout)
        dp = warpgroup_mma_wait(0, deps=[dp])
        dlogits = gradient_of_logits(dp, p, shared, stage, dtype, s_layout, FLAGS.has_dropout)
        ds.index(0).store(dlogits)
        fence_async_shared()
        barrier_arrive(DS_FULL, CONSUMERS, 4)
        ds_operand = gl.convert_layout(dlogits, p_layout)
        dq = _start_dq(ds, shared.k, zero_q, opaque_false, 1)
        dk = warpgroup_mma(ds_operand, shared.q.index(stage), dk, is_async=True)
        dq = warpgroup_mma_wait(1, deps=[dq])
        add_dq_of_step(dq, inputs.dq_out, visit, tile, True, 0, BLOCK_D // 2, TILE)
        dk = warpgroup_mma_wait(0, deps=[dk])
        release_stage(BLOCK_EMPTY, stage, PRODUCER_AND_CONSUMERS)
        visit = next_visit(visit, tile, GROUP, True)
    keys = OutputKeys(tile.first, tile.length_k, tile.begin_k, tile.head_kv)
    offsets, inside = key_offsets(
        keys, results.token, results.head, TILE.head_dim, o_layout, BLOCK_N, BLOCK_D
    )
    factors = inputs.factors
    gl.store(
        results.dk + offsets, (dk * (factors.scale * factors.keep_scale)).to(dtype), mask=inside
    )


@gluon.jit(
    do_not_specialize=[
        "per_head",
        "total_q",
        "window_left",
        "window_right",
        "threshold",
        "first_head",
    ]
)
def varlen_bwd_wide_hopper_kernel(
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
    TILE: gl.constexpr,
    FLAGS: gl.constexpr,
):
    """Computes dk and dv of a tile of 64 keys, and adds its partial dq to a float32 buffer.

    Grid: (2 * tiles of 128 keys * key/value heads,). The arguments are those of
    varlen_bwd_hopper_kernel with TILE.dq_from_registers.
    """
    BLOCK_M: gl.constexpr = TILE.block_m
    BLOCK_N: gl.constexpr = TILE.block_n
    BLOCK_D: gl.constexpr = TILE.block_d
    STAGES: gl.constexpr = TILE.stages
    gl.static_assert(BLOCK_M == 64 and BLOCK_N == 64, "each warpgroup multiplies 64 keys")
    gl.static_assert(TILE.dq_from_registers and dq_desc is None, "there is no dQ warp")
    gl.static_assert(TILE.stages <= VARLEN_BWD_WIDE_STAGES, "named barriers overlap")
    dtype: gl.constexpr = q_desc.dtype
    left, right = load_window(pointers.window, window_left, window_right)
    window = Bounds(left, right)
    document, tile = locate(pointers, window, TILE, FLAGS)

    vector_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    rows_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_D], dtype)
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_M], dtype)
    k_bufs = gl.allocate_shared_memory(dtype, [1, BLOCK_N, BLOCK_D], rows_layout)
    v_bufs = gl.allocate_shared_memory(dtype, [1, BLOCK_N, BLOCK_D], rows_layout)
    q_bufs = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_D], rows_layout)
    do_bufs = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_D], rows_layout)
    weights = gl.allocate_shared_memory(dtype, [1, BLOCK_N, BLOCK_M], ds_layout)
    ds_bufs = gl.allocate_shared_memory(dtype, [1, BLOCK_N, BLOCK_M], ds_layout)
    lse_bufs = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], vector_layout)
    delta_bufs = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], vector_layout)
    kv_ready = gl.allocate_shared_memory(gl.int64, [1], bar)
    q_ready, dout_ready = allocate_query_bars(STAGES)
    mbarrier.init(kv_ready, count=1)
    slab_ptr = first_slab(pointers.dq_sum, per_head, tile, document, TILE)
    shared = BackwardBuffers(
        k_bufs, v_bufs, q_bufs, do_bufs, lse_bufs, delta_bufs, kv_ready, q_ready, dout_ready
    )
    results = KeyGradients(pointers.dk, pointers.dv, strides.dk_token, strides.dk_head)
    dropout = DropoutInputs(
        pointers.dropout_seed,
        pointers.document_ids,
        pointers.query_offsets,
        document,
        threshold,
        first_head,
    )
    factors = Factors(scale, softcap, keep_scale)
    stats = Statistics(pointers.lse, pointers.delta, total_q)
    inputs = ComputeInputs(
        shared, DqSlabs(slab_ptr, per_head), ds_bufs, results, tile, window, dropout, factors
    )
    gl.warp_specialize(
        [
            (_weights_and_dv, (inputs, weights, ds_bufs, TILE, FLAGS)),
            (_gradients_and_dk, (inputs, weights, ds_bufs, TILE, FLAGS)),
            (load_tensors, (q_desc, do_desc, k_desc, v_desc, shared, stats, tile, TILE)),
        ],
        [4, 1],
        [240, 24],
    )
