"""Forward of varlen attention for Hopper, in Gluon: a persistent, warp-specialised kernel.

A producer warp loads queries, keys and values by TMA, consumer warpgroups compute, and a scheduler
warp hands out tiles of queries.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
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
from lctrain_kernels.gluon.compat import partition_barrier, tma_store_wait
from lctrain_kernels.gluon.coordinates import RAGGED, LocalQueries, QueryRows, Rows, Visible, Window
from lctrain_kernels.gluon.dropout import block_bits, dropout_key
from lctrain_kernels.gluon.forward_pipeline import (
    allocate_forward,
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
from lctrain_kernels.gluon.structures import ConsumerPointers, Scalars, SchedulerInputs
from lctrain_kernels.gluon.tile_scheduler import TILE_FIELDS, TILES_AHEAD, read_tile, schedule_tiles
from lctrain_kernels.tile.logits import LN_2, LOG2_E

_LOG2_E = gl.constexpr(LOG2_E)
_LN_2 = gl.constexpr(LN_2)


@gluon.jit
def _load(q_desc, k_desc, v_desc, shared, TILE: gl.constexpr):
    """Runs the producer warp: loads the queries, keys and values of one tile after the other.

    The warp loads as far ahead of the consumers as pipeline stages are empty.

    Args:
        q_desc: TMA descriptor of q [T, H, D].
        k_desc: TMA descriptor of k [Tk, Hk, D].
        v_desc: TMA descriptor of v [Tk, Hk, D].
        shared: Shared memory of the kernel, a ForwardBuffers.
        TILE: Tile sizes and head counts of the forward kernel, a ForwardShape.
    """
    Q_STAGES: gl.constexpr = TILE.q_stages
    STAGES: gl.constexpr = TILE.stages
    THREADS: gl.constexpr = 32 + 128 * TILE.consumers  # of the producer and all consumers
    tile_index = 0
    kv_index = 0
    mbarrier.wait(shared.tile_bars.ready.index(0), 0)
    document = load_scalar(shared.tiles.index(0), 1)
    while document >= 0:
        tile = read_tile(shared.tiles, tile_index, 1)
        mbarrier.arrive(shared.tile_bars.empty.index(tile_index % TILES_AHEAD), count=1)
        q_stage = tile_index % Q_STAGES
        mbarrier.wait(shared.q_bars.empty.index(q_stage), ((tile_index // Q_STAGES) & 1) ^ 1)
        queries = QueryRows(tile.end_q, tile.length_q, tile.first, tile.head)
        load_queries(q_desc, shared.q, shared.q_bars.ready, q_stage, queries, TILE)
        head_kv = tile.head // TILE.group
        for block in range(tile.high - tile.low):
            stage = kv_index % STAGES
            row = RAGGED - tile.length_k + (tile.high - 1 - block) * TILE.block_n
            keys = Rows(tile.end_k, row, head_kv)
            acquire_stage(K_EMPTY, kv_index, STAGES, THREADS)
            load_block(k_desc, shared.k.index(stage), shared.k_ready.index(stage), keys)
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
def _consume(
    out_desc,
    shared,
    window,
    pointers,
    scalars,
    TILE: gl.constexpr,
    FLAGS: gl.constexpr,
    CONSUMER: gl.constexpr,
):
    """Runs a consumer warpgroup, which computes out and lse of its 64 rows of every tile.

    Args:
        out_desc: TMA descriptor of out [T, H, D].
        shared: Shared memory of the kernel, a ForwardBuffers.
        window: Attention window of the call, a Window.
        pointers: Tensors that the warpgroup accesses without TMA, a ConsumerPointers.
        scalars: Scalar arguments of the call, a Scalars.
        TILE: Tile sizes and head counts of the forward kernel, a ForwardShape.
        FLAGS: Features beyond plain attention, a tile.structures.Flags.
        CONSUMER: Index of this consumer warpgroup.
    """
    CONSUMERS: gl.constexpr = TILE.consumers
    BLOCK_N: gl.constexpr = TILE.block_n
    BLOCK_D: gl.constexpr = TILE.block_d
    Q_STAGES: gl.constexpr = TILE.q_stages
    STAGES: gl.constexpr = TILE.stages
    THREADS: gl.constexpr = 32 + 128 * CONSUMERS  # of the producer and all consumers
    POSITIONS: gl.constexpr = CONSUMERS * 64 // TILE.pack
    RUN: gl.constexpr = POSITIONS if POSITIONS < 64 else 64
    FEW_REGISTERS: gl.constexpr = POSITIONS > RUN  # the code for two runs takes registers
    FIRST_RUN: gl.constexpr = CONSUMER * (64 // RUN)
    dtype: gl.constexpr = out_desc.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
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
        last = (tile_index + Q_STAGES - 1) % Q_STAGES
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
            pointers, scalars.first_head, document, tile_head, first, local_query, FLAGS.has_dropout
        )
        m, l = initial_state(BLOCK_N)
        acc = gl.zeros([64, BLOCK_D], gl.float32, o_layout)
        q = shared.q.index(q_stage * CONSUMERS + CONSUMER)
        mbarrier.wait(shared.q_bars.ready.index(q_stage), (tile_index // Q_STAGES) & 1)
        if high > low:
            mbarrier.wait(shared.k_ready.index(stage), phase)
            s_token = warpgroup_mma(
                q, shared.k.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True
            )
            bits = block_bits(random, high - 1, BLOCK_N, s_layout, FLAGS.has_dropout)
            s = warpgroup_mma_wait(0, deps=[s_token])
            release_stage(K_EMPTY, stage, THREADS)
            p, alpha, m, l = softmax_step(
                s,
                m,
                l,
                high - 1,
                rows,
                visible,
                bits,
                scalars.threshold,
                scalars.scale,
                scalars.softcap,
                s_layout,
                dtype,
                FLAGS,
                FEW_REGISTERS,
            )
            if Q_STAGES > 1:
                # The store of the last tile's result has completed by now.
                tma_store_wait(0)
                mbarrier.arrive(shared.q_bars.empty.index(last), count=1, pred=tile_index > 0)
            p = gl.convert_layout(p, p_layout)
            mbarrier.wait(shared.v_ready.index(stage), phase)
            for block in range(1, high - low):
                previous_stage = stage
                stage, phase = next_stage(stage, phase, STAGES)
                mbarrier.wait(shared.k_ready.index(stage), phase)
                if TILE.sync_before_products:
                    # Without this barrier, the wait for values below synchronises the warps.
                    partition_barrier()
                s_token = warpgroup_mma(
                    q, shared.k.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True
                )
                acc_token = warpgroup_mma(p, shared.v.index(previous_stage), acc, is_async=True)
                bits = block_bits(random, high - 1 - block, BLOCK_N, s_layout, FLAGS.has_dropout)
                s = warpgroup_mma_wait(1, deps=[s_token])
                release_stage(K_EMPTY, stage, THREADS)
                p_next, alpha, m, l = softmax_step(
                    s,
                    m,
                    l,
                    high - 1 - block,
                    rows,
                    visible,
                    bits,
                    scalars.threshold,
                    scalars.scale,
                    scalars.softcap,
                    s_layout,
                    dtype,
                    FLAGS,
                    FEW_REGISTERS,
                    HAS_MAX=True,
                )
                # A scheduling fence: ptxas moves no later wait above the branch of this wait.
                mbarrier.wait(shared.v_ready.index(stage), phase)
                acc = warpgroup_mma_wait(0, deps=[acc_token])
                release_stage(V_EMPTY, previous_stage, THREADS)
                p = gl.convert_layout(p_next, p_layout)
                acc = rescale(acc, alpha, o_layout)
            acc_token = warpgroup_mma(p, shared.v.index(stage), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc_token])
            release_stage(V_EMPTY, stage, THREADS)
            stage, phase = next_stage(stage, phase, STAGES)
        else:
            if Q_STAGES > 1:
                tma_store_wait(0)
                mbarrier.arrive(shared.q_bars.empty.index(last), count=1, pred=tile_index > 0)
        m, l = reduce_rows(m, l, row_s)
        if FLAGS.has_sink:
            sink = gl.load(pointers.factor + tile_head).to(gl.float32) * _LOG2_E
            m_new = gl.maximum(m, sink)
            alpha = gl.exp2(m - m_new)
            l = l * alpha + gl.exp2(sink - m_new)
            acc = acc * gl.convert_layout(alpha, row_o)[:, None]
            m = m_new
        empty = l == 0.0
        whole = gl.where(empty, 1.0, l)
        inverse = gl.convert_layout(scalars.keep_scale / whole, row_o)
        lse = gl.where(empty, float("-inf"), (m + gl.log2(whole)) * _LN_2)
        row = tile_head.to(gl.int64) * scalars.total_q + tile.end_q - tile.length_q + query
        gl.store(pointers.lse + row, lse, mask=query < tile.length_q)
        # The result overwrites the queries in shared memory.
        q.store((acc * inverse[:, None]).to(dtype))
        store_rows(out_desc, q, QueryRows(tile.end_q, tile.length_q, first, head), RUN)
        if Q_STAGES == 1:
            tma_store_wait(0)
            mbarrier.arrive(shared.q_bars.empty.index(q_stage), count=1)
        tile_index += 1
        ahead = tile_index % TILES_AHEAD
        mbarrier.wait(shared.tile_bars.ready.index(ahead), (tile_index // TILES_AHEAD) & 1)
        document = load_scalar(shared.tiles.index(ahead * TILE_FIELDS), 4)
    tma_store_wait(0)


class ForwardPointers(NamedTuple):
    """Pointers to the tensors that varlen_fwd_hopper_kernel accesses without TMA.

    The kernel's docstring gives the shapes of operands and results. Boundaries, tiles, document_ids
    and query_offsets are those of TiledPack; options are those of AttentionOptions.
    """

    lse: Any
    cu_seqlens_q: Any
    cu_seqlens_k: Any
    tiles: Any
    counter: Any
    window: Any
    learnable_sink: Any
    dropout_seed: Any
    document_ids: Any
    query_offsets: Any


@gluon.jit(
    do_not_specialize=[
        "num_items",
        "total_q",
        "window_left",
        "window_right",
        "threshold",
        "first_head",
    ]
)
def varlen_fwd_hopper_kernel(
    q_desc,
    k_desc,
    v_desc,
    out_desc,
    pointers: ForwardPointers,
    num_items,
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
    """Computes out and lse, with one persistent program per multiprocessor.

    A program has consumer warpgroups, a producer warp and a scheduler warp. A tile has 64 rows per
    consumer warpgroup. A row is a pair of query head and position; a tile covers TILE.pack query
    heads that share a key/value head. With three consumer warpgroups TILE.pack is 1.
    pointers.counter is an int32, zero at launch.

    Grid: at most one program per multiprocessor. gluon/structures.py describes the arguments that
    are not named here.
    """
    dtype: gl.constexpr = q_desc.dtype
    gl.static_assert(TILE.stages <= FORWARD_STAGES, "named barriers overlap")
    shared = allocate_forward(dtype, TILE)
    inputs = SchedulerInputs(
        pointers.cu_seqlens_q, pointers.cu_seqlens_k, pointers.tiles, pointers.counter, num_items
    )
    window = Window(pointers.window, window_left, window_right)
    rows = ConsumerPointers(
        pointers.lse,
        pointers.learnable_sink,
        pointers.dropout_seed,
        pointers.document_ids,
        pointers.query_offsets,
    )
    scalars = Scalars(total_q, scale, softcap, threshold, keep_scale, first_head)
    if TILE.consumers == 2:
        gl.warp_specialize(
            [
                (_consume, (out_desc, shared, window, rows, scalars, TILE, FLAGS, 0)),
                (_consume, (out_desc, shared, window, rows, scalars, TILE, FLAGS, 1)),
                (_load, (q_desc, k_desc, v_desc, shared, TILE)),
                (schedule_tiles, (shared.tiles, shared.tile_bars, inputs, window, TILE, FLAGS)),
            ],
            [4, 1, 1],
            [240, 24, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (out_desc, shared, window, rows, scalars, TILE, FLAGS, 0)),
                (_consume, (out_desc, shared, window, rows, scalars, TILE, FLAGS, 1)),
                (_consume, (out_desc, shared, window, rows, scalars, TILE, FLAGS, 2)),
                (_load, (q_desc, k_desc, v_desc, shared, TILE)),
                (schedule_tiles, (shared.tiles, shared.tile_bars, inputs, window, TILE, FLAGS)),
            ],
            [4, 4, 1, 1],
            [160, 160, 24, 24],
        )
