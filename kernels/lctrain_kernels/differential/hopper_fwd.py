"""Forward of differential attention for Hopper, in Gluon: a warpgroup computes both branches."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from lctrain_kernels.differential.hopper_structures import (
    BranchPointers,
    ForwardInputs,
    ForwardPointers,
    Outputs,
)
from lctrain_kernels.gluon.barriers import (
    FORWARD_STAGES,
    K_EMPTY,
    V_EMPTY,
    acquire_stage,
    drain_stages,
    next_stage,
    release_stage,
)
from lctrain_kernels.gluon.compat import reinterpret, tma_store_wait
from lctrain_kernels.gluon.coordinates import RAGGED, LocalQueries, QueryRows, Rows, Visible, Window
from lctrain_kernels.gluon.dropout import block_bits, branch_key, dropout_key
from lctrain_kernels.gluon.forward_pipeline import (
    allocate_branches,
    load_block,
    load_queries,
    store_rows,
)
from lctrain_kernels.gluon.primitives import load_scalar, load_window
from lctrain_kernels.gluon.softmax import (
    initial_state,
    reduce_rows,
    rescale,
    softmax_step,
)
from lctrain_kernels.gluon.structures import Scalars, SchedulerInputs
from lctrain_kernels.gluon.tile_scheduler import TILE_FIELDS, TILES_AHEAD, read_tile, schedule_tiles
from lctrain_kernels.tile.logits import LN_2

_LN_2 = gl.constexpr(LN_2)


@gluon.jit
def _load(
    q_descs,
    k_descs,
    v_desc,
    shared,
    TILE: gl.constexpr,
):
    """Runs the producer warp: loads the queries, keys and values of one tile after the other."""
    Q_STAGES: gl.constexpr = TILE.q_stages
    STAGES: gl.constexpr = TILE.stages
    THREADS: gl.constexpr = 32 + 128 * TILE.consumers  # of the producer and all consumers
    NUM_K: gl.constexpr = TILE.num_k
    tile_index = 0
    kv_index = 0
    mbarrier.wait(shared.tile_bars.ready.index(0), 0)
    document = load_scalar(shared.tiles.index(0), 1)
    while document >= 0:
        tile = read_tile(shared.tiles, tile_index, 1)
        mbarrier.arrive(shared.tile_bars.empty.index(tile_index % TILES_AHEAD), count=1)
        q_stage = tile_index % Q_STAGES
        queries = QueryRows(tile.end_q, tile.length_q, tile.first, tile.head)
        mbarrier.wait(shared.q_bars.empty.index(q_stage), ((tile_index // Q_STAGES) & 1) ^ 1)
        for branch in gl.static_range(2):
            load_queries(
                q_descs[branch], shared.q, shared.q_bars.ready, q_stage, queries, TILE, branch, 2
            )
        head_kv = tile.head // TILE.group
        for block in range(tile.high - tile.low):
            stage = kv_index % STAGES
            row = RAGGED - tile.length_k + (tile.high - 1 - block) * TILE.block_n
            keys = Rows(tile.end_k, row, head_kv)
            acquire_stage(K_EMPTY, kv_index, STAGES, THREADS)
            for branch in gl.static_range(NUM_K):
                k_buf = shared.k.index(stage * NUM_K + branch)
                load_block(k_descs[branch], k_buf, shared.k_ready.index(stage), keys)
            acquire_stage(V_EMPTY, kv_index, STAGES, THREADS)
            load_block(v_desc, shared.v.index(stage), shared.v_ready.index(stage), keys)
            kv_index += 1
        tile_index += 1
        ahead = tile_index % TILES_AHEAD
        mbarrier.wait(shared.tile_bars.ready.index(ahead), (tile_index // TILES_AHEAD) & 1)
        document = load_scalar(shared.tiles.index(ahead * TILE_FIELDS), 1)
    drain_stages(K_EMPTY, kv_index, STAGES, THREADS)
    drain_stages(V_EMPTY, kv_index, STAGES, THREADS)


@gluon.jit
def _finish(m, l, keep_scale, row_s: gl.constexpr, row_o: gl.constexpr):
    """Returns (keep_scale / l, lse), [64] each, of one branch's m and l; the first scales acc."""
    m, l = reduce_rows(m, l, row_s)
    empty = l == 0.0
    whole = gl.where(empty, 1.0, l)
    lse = gl.where(empty, float("-inf"), (m + gl.log2(whole)) * _LN_2)
    return gl.convert_layout(keep_scale / whole, row_o), lse


@gluon.jit
def _consume(
    inputs,
    TILE: gl.constexpr,
    FLAGS: gl.constexpr,
    CONSUMER: gl.constexpr,
):
    """Runs a consumer warpgroup, which computes both branches of its 64 rows of every tile."""
    out_descs = inputs.out_descs
    shared = inputs.shared
    out_bufs = inputs.out_bufs
    window = inputs.window
    pointers = inputs.pointers
    scalars = inputs.scalars
    CONSUMERS: gl.constexpr = TILE.consumers
    BLOCK_N: gl.constexpr = TILE.block_n
    BLOCK_D: gl.constexpr = TILE.block_d
    Q_STAGES: gl.constexpr = TILE.q_stages
    STAGES: gl.constexpr = TILE.stages
    THREADS: gl.constexpr = 32 + 128 * CONSUMERS  # of the producer and all consumers
    BLOCK_DV: gl.constexpr = TILE.block_dv
    # Values and maxima of 128 columns leave no registers for weights beside logits.
    SPECULATES: gl.constexpr = BLOCK_D == 64
    NUM_K: gl.constexpr = TILE.num_k
    HAS_DROPOUT: gl.constexpr = FLAGS.has_dropout
    POSITIONS: gl.constexpr = CONSUMERS * 64 // TILE.pack
    RUN: gl.constexpr = POSITIONS if POSITIONS < 64 else 64
    FIRST_RUN: gl.constexpr = CONSUMER * (64 // RUN)
    IN_Q: gl.constexpr = 2 * BLOCK_D // BLOCK_DV  # results in the queries' buffer
    dtype: gl.constexpr = out_descs.out.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_DV, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_D], dtype)
    out_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_DV], dtype)
    row_s: gl.constexpr = gl.SliceLayout(1, s_layout)
    row_o: gl.constexpr = gl.SliceLayout(1, o_layout)

    left, right = load_window(window.pointer, window.left, window.right)
    local = gl.arange(0, 64, row_s)
    start: gl.constexpr = FIRST_RUN % (POSITIONS // RUN) * RUN  # first position of this warpgroup
    zero = gl.zeros([64, BLOCK_N], gl.float32, s_layout)
    tile_index = 0
    stage = 0
    phase = 0
    mbarrier.wait(shared.tile_bars.ready.index(0), 0)
    document = load_scalar(shared.tiles.index(0), 4)
    while document >= 0:
        tile = read_tile(shared.tiles, tile_index, 4)
        first = tile.first + start
        head = tile.head + FIRST_RUN // (POSITIONS // RUN)
        low = tile.low
        high = tile.high
        length_k = tile.length_k
        mbarrier.arrive(shared.tile_bars.empty.index(tile_index % TILES_AHEAD), count=1)
        q_stage = tile_index % Q_STAGES
        shift = length_k - tile.length_q
        local_query = local % RUN
        query = first + local_query
        tile_head = head + local // RUN
        if FLAGS.has_right and POSITIONS > RUN:
            # Blocks that only later rows of the tile see.
            seen = gl.minimum(gl.maximum(first + RUN + shift + right, 0), length_k)
            own = gl.maximum((seen + BLOCK_N - 1) // BLOCK_N, low)
            for _ in range(high - own):
                mbarrier.wait(shared.k_ready.index(stage), phase)
                release_stage(K_EMPTY, stage, THREADS)
                mbarrier.wait(shared.v_ready.index(stage), phase)
                release_stage(V_EMPTY, stage, THREADS)
                stage, phase = next_stage(stage, phase, STAGES)
            high = own
        clear_high = length_k
        if FLAGS.has_right:
            clear_high = gl.minimum(length_k, first + shift + right + 1)
        clear_low = 0
        if FLAGS.has_left:
            clear_low = first + RUN - 1 + shift - left
        rows = LocalQueries(first, local_query)
        visible = Visible(shift, length_k, left, right, clear_low, clear_high)
        random = dropout_key(
            pointers, scalars.first_head, document, tile_head, first, local_query, HAS_DROPOUT
        )
        random1 = branch_key(random, 0)
        random2 = branch_key(random, 1)
        m1, l1 = initial_state(BLOCK_N)
        m2, l2 = initial_state(BLOCK_N)
        acc1 = gl.zeros([64, BLOCK_DV], gl.float32, o_layout)
        acc2 = gl.zeros([64, BLOCK_DV], gl.float32, o_layout)
        queries = shared.q.index(q_stage * CONSUMERS + CONSUMER)
        q = reinterpret(queries, dtype, [2, 64, BLOCK_D], q_layout)
        mbarrier.wait(shared.q_bars.ready.index(q_stage), (tile_index // Q_STAGES) & 1)
        if high > low:
            mbarrier.wait(shared.k_ready.index(stage), phase)
            s1_token = warpgroup_mma(
                q.index(0),
                shared.k.index(stage * NUM_K).permute((1, 0)),
                zero,
                use_acc=False,
                is_async=True,
            )
            bits = block_bits(random1, high - 1, BLOCK_N, s_layout, HAS_DROPOUT)
            s1 = warpgroup_mma_wait(0, deps=[s1_token])
            p, alpha, m1, l1 = softmax_step(
                s1,
                m1,
                l1,
                high - 1,
                rows,
                visible,
                bits,
                scalars.threshold,
                scalars.scale,
                0.0,
                s_layout,
                dtype,
                FLAGS,
            )
            p1 = gl.convert_layout(p, p_layout)
            if Q_STAGES > 1:
                # The stores of the last tile's results have completed by now.
                tma_store_wait(0)
                mbarrier.arrive(
                    shared.q_bars.empty.index((tile_index + 1) % Q_STAGES),
                    count=1,
                    pred=tile_index > 0,
                )
            mbarrier.wait(shared.v_ready.index(stage), phase)
            s2_token = warpgroup_mma(
                q.index(1),
                shared.k.index(stage * NUM_K + NUM_K - 1).permute((1, 0)),
                zero,
                use_acc=False,
                is_async=True,
            )
            acc1_token = warpgroup_mma(p1, shared.v.index(stage), acc1, is_async=True)
            bits = block_bits(random2, high - 1, BLOCK_N, s_layout, HAS_DROPOUT)
            s2 = warpgroup_mma_wait(1, deps=[s2_token])
            release_stage(K_EMPTY, stage, THREADS)
            p, alpha, m2, l2 = softmax_step(
                s2,
                m2,
                l2,
                high - 1,
                rows,
                visible,
                bits,
                scalars.threshold,
                scalars.scale,
                0.0,
                s_layout,
                dtype,
                FLAGS,
            )
            # A scheduling fence: ptxas does not move the next wait above this one, which is over.
            mbarrier.wait(shared.v_ready.index(stage), phase)
            acc1 = warpgroup_mma_wait(0, deps=[acc1_token])
            p2 = gl.convert_layout(p, p_layout)
            for block in range(1, high - low):
                # Branch 1 of this block, while p2 of the previous block is multiplied by its v.
                previous_stage = stage
                stage, phase = next_stage(stage, phase, STAGES)
                mbarrier.wait(shared.k_ready.index(stage), phase)
                s1_token = warpgroup_mma(
                    q.index(0),
                    shared.k.index(stage * NUM_K).permute((1, 0)),
                    zero,
                    use_acc=False,
                    is_async=True,
                )
                acc2_token = warpgroup_mma(p2, shared.v.index(previous_stage), acc2, is_async=True)
                bits = block_bits(random1, high - 1 - block, BLOCK_N, s_layout, HAS_DROPOUT)
                s1 = warpgroup_mma_wait(1, deps=[s1_token])
                p, alpha, m1, l1 = softmax_step(
                    s1,
                    m1,
                    l1,
                    high - 1 - block,
                    rows,
                    visible,
                    bits,
                    scalars.threshold,
                    scalars.scale,
                    0.0,
                    s_layout,
                    dtype,
                    FLAGS,
                    HAS_MAX=SPECULATES,
                )
                mbarrier.wait(shared.v_ready.index(stage), phase)
                acc2 = warpgroup_mma_wait(0, deps=[acc2_token])
                release_stage(V_EMPTY, previous_stage, THREADS)
                p1 = gl.convert_layout(p, p_layout)
                acc1 = rescale(acc1, alpha, o_layout)
                # Branch 2 of this block, while p1 is multiplied by v.
                s2_token = warpgroup_mma(
                    q.index(1),
                    shared.k.index(stage * NUM_K + NUM_K - 1).permute((1, 0)),
                    zero,
                    use_acc=False,
                    is_async=True,
                )
                acc1_token = warpgroup_mma(p1, shared.v.index(stage), acc1, is_async=True)
                bits = block_bits(random2, high - 1 - block, BLOCK_N, s_layout, HAS_DROPOUT)
                s2 = warpgroup_mma_wait(1, deps=[s2_token])
                release_stage(K_EMPTY, stage, THREADS)
                p, alpha, m2, l2 = softmax_step(
                    s2,
                    m2,
                    l2,
                    high - 1 - block,
                    rows,
                    visible,
                    bits,
                    scalars.threshold,
                    scalars.scale,
                    0.0,
                    s_layout,
                    dtype,
                    FLAGS,
                    HAS_MAX=SPECULATES,
                )
                mbarrier.wait(shared.v_ready.index(stage), phase)
                acc1 = warpgroup_mma_wait(0, deps=[acc1_token])
                p2 = gl.convert_layout(p, p_layout)
                acc2 = rescale(acc2, alpha, o_layout)
            acc2_token = warpgroup_mma(p2, shared.v.index(stage), acc2, is_async=True)
            acc2 = warpgroup_mma_wait(0, deps=[acc2_token])
            release_stage(V_EMPTY, stage, THREADS)
            stage, phase = next_stage(stage, phase, STAGES)
        else:
            if Q_STAGES > 1:
                tma_store_wait(0)
                mbarrier.arrive(
                    shared.q_bars.empty.index((tile_index + 1) % Q_STAGES),
                    count=1,
                    pred=tile_index > 0,
                )
        inverse1, lse1 = _finish(m1, l1, scalars.keep_scale, row_s, row_o)
        inverse2, lse2 = _finish(m2, l2, scalars.keep_scale, row_s, row_o)
        inside = query < tile.length_q
        token = (tile.end_q - tile.length_q + query).to(gl.int64)
        row = tile_head.to(gl.int64) * scalars.total_q + token
        gl.store(pointers.lse1 + row, lse1, mask=inside)
        gl.store(pointers.lse2 + row, lse2, mask=inside)
        lam_ptrs = (
            pointers.lam + token * inputs.stride_lt + tile_head.to(gl.int64) * inputs.stride_lh
        )
        lam = gl.convert_layout(gl.load(lam_ptrs, mask=inside, other=0.0), row_o)
        # The shared memory of the queries takes as many results as it can hold.
        results = reinterpret(queries, dtype, [IN_Q, 64, BLOCK_DV], out_layout)
        out1 = acc1 * inverse1[:, None]
        out2 = acc2 * inverse2[:, None]
        out_buf = results.index(0)
        out2_buf = out_bufs.index(CONSUMER * (3 - IN_Q))
        out1_buf = results.index(1) if IN_Q == 2 else out_bufs.index(CONSUMER * 2 + 1)
        out1_buf.store(out1.to(dtype))
        out2_buf.store(out2.to(dtype))
        out_buf.store((out1 - lam[:, None] * out2).to(dtype))
        out_rows = QueryRows(tile.end_q, tile.length_q, first, head)
        store_rows(out_descs.out, out_buf, out_rows, RUN)
        store_rows(out_descs.out1, out1_buf, out_rows, RUN)
        store_rows(out_descs.out2, out2_buf, out_rows, RUN)
        if Q_STAGES == 1:
            tma_store_wait(0)
            mbarrier.arrive(shared.q_bars.empty.index(q_stage), count=1)
        tile_index += 1
        ahead = tile_index % TILES_AHEAD
        mbarrier.wait(shared.tile_bars.ready.index(ahead), (tile_index // TILES_AHEAD) & 1)
        document = load_scalar(shared.tiles.index(ahead * TILE_FIELDS), 4)
    tma_store_wait(0)


@gluon.jit(
    do_not_specialize=[
        *("stride_lt", "stride_lh", "num_items", "total_q", "window_left", "window_right"),
        *("threshold", "first_head"),
    ]
)
def differential_fwd_hopper_kernel(
    q1_desc,
    q2_desc,
    k1_desc,
    k2_desc,
    v_desc,
    out_desc,
    out1_desc,
    out2_desc,
    pointers: ForwardPointers,
    stride_lt,
    stride_lh,
    num_items,
    total_q,
    window_left,
    window_right,
    scale,
    threshold,
    keep_scale,
    first_head,
    TILE: gl.constexpr,
    FLAGS: gl.constexpr,
):
    """Computes the outputs and lse of both branches, one persistent program per multiprocessor.

    A program has consumer warpgroups, a producer warp and a scheduler warp, as in
    varlen_fwd_hopper_kernel. A consumer warpgroup computes both branches of its rows: while it
    computes the weights of one branch, the products of the other branch run.

    Shapes: lam [T, H] float32, any strides; out, out1 = A1 v and out2 = A2 v [T, H, Dv]; lse1, lse2
    [H, T] float32. k2_desc is None if both branches read k1. FLAGS have no softcap and no sink.
    stride_lt and stride_lh are the strides of lam's tokens and heads. gluon/structures.py describes
    the arguments that are not named here.
    """
    dtype: gl.constexpr = q1_desc.dtype
    gl.static_assert(TILE.stages <= FORWARD_STAGES, "named barriers overlap")
    shared, out_bufs = allocate_branches(dtype, TILE)
    inputs = SchedulerInputs(
        pointers.cu_seqlens_q, pointers.cu_seqlens_k, pointers.tiles, pointers.counter, num_items
    )
    window = Window(pointers.window, window_left, window_right)
    rows = BranchPointers(
        pointers.lam,
        pointers.lse1,
        pointers.lse2,
        pointers.dropout_seed,
        pointers.document_ids,
        pointers.query_offsets,
    )
    scalars = Scalars(total_q, scale, None, threshold, keep_scale, first_head)
    outs = Outputs(out_desc, out1_desc, out2_desc)
    consumer = ForwardInputs(outs, shared, out_bufs, window, rows, stride_lt, stride_lh, scalars)
    q_descs = (q1_desc, q2_desc)
    k_descs = (k1_desc, k2_desc)
    gl.warp_specialize(
        [
            (_consume, (consumer, TILE, FLAGS, 0)),
            (_consume, (consumer, TILE, FLAGS, 1)),
            (_load, (q_descs, k_descs, v_desc, shared, TILE)),
            (schedule_tiles, (shared.tiles, shared.tile_bars, inputs, window, TILE, FLAGS)),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )
