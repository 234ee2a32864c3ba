"""Forward of dual chunk attention for Hopper, in Gluon: one loop over three ranges of keys.

ranges.py defines the ranges; a chunk has c tokens. One softmax runs over INTER with queries rotated
to the inter position, SUCC with keys rotated by -c, and INTRA with unrotated queries and keys. So a
tile has its queries in shared memory twice.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from lctrain_kernels.dual_chunk.hopper_ranges import keys_of_query, keys_of_tile
from lctrain_kernels.dual_chunk.hopper_structures import BlockRanges, ForwardPointers
from lctrain_kernels.dual_chunk.ranges import INTER, INTRA, SUCC
from lctrain_kernels.gluon.barriers import (
    FORWARD_STAGES,
    K_EMPTY,
    V_EMPTY,
    acquire_stage,
    drain_stages,
    next_stage,
    release_stage,
)
from lctrain_kernels.gluon.compat import tma_store_wait
from lctrain_kernels.gluon.coordinates import RAGGED, QueryRows, Rows, Window
from lctrain_kernels.gluon.dropout import bits_from_key, dropout_key
from lctrain_kernels.gluon.forward_pipeline import (
    allocate_forward,
    load_block,
    load_queries,
    store_rows,
)
from lctrain_kernels.gluon.primitives import load_scalar
from lctrain_kernels.gluon.softmax import (
    initial_state,
    online_softmax,
    reduce_rows,
    rescale,
)
from lctrain_kernels.gluon.structures import ConsumerPointers, Scalars, SchedulerInputs
from lctrain_kernels.gluon.tile_scheduler import TILE_FIELDS, TILES_AHEAD, read_tile, schedule_tiles
from lctrain_kernels.tile.logits import LN_2, LOG2_E

_LOG2_E = gl.constexpr(LOG2_E)
_LN_2 = gl.constexpr(LN_2)


@gluon.jit
def _blocks_of_relations(first, last, c, succ_length, BLOCK_N: gl.constexpr, ALIGNED: gl.constexpr):
    """Returns the BlockRanges of the queries at positions [first, last]; a chunk has c tokens."""
    inter_low, inter_clear, inter_high = keys_of_tile(
        first, last, INTER, c, succ_length, BLOCK_N, ALIGNED
    )
    succ_low, succ_clear, succ_high = keys_of_tile(
        first, last, SUCC, c, succ_length, BLOCK_N, ALIGNED
    )
    intra_low, intra_clear, intra_high = keys_of_tile(
        first, last, INTRA, c, succ_length, BLOCK_N, ALIGNED
    )
    succ_block = (gl.maximum(inter_high - inter_low, 0) + BLOCK_N - 1) // BLOCK_N
    intra_block = succ_block + (gl.maximum(succ_high - succ_low, 0) + BLOCK_N - 1) // BLOCK_N
    blocks = intra_block + (gl.maximum(intra_high - intra_low, 0) + BLOCK_N - 1) // BLOCK_N
    return BlockRanges(
        succ_block,
        intra_block,
        blocks,
        succ_low - succ_block * BLOCK_N,
        intra_low - intra_block * BLOCK_N,
        inter_clear,
        succ_clear,
        intra_clear,
    )


@gluon.jit
def _first_key(block, ranges, BLOCK_N: gl.constexpr):
    """Returns the position of the first key of a block of keys; see BlockRanges."""
    shift = gl.where(block < ranges.intra_block, ranges.succ_shift, ranges.intra_shift)
    return block * BLOCK_N + gl.where(block < ranges.succ_block, 0, shift)


@gluon.jit
def _load(
    q_desc,
    out_desc,
    k_desc,
    k_succ_desc,
    v_desc,
    shared,
    chunk_length,
    succ_length,
    TILE: gl.constexpr,
    FLAGS: gl.constexpr,
):
    """Runs the producer warp: loads the queries, keys and values of one tile after the other."""
    Q_STAGES: gl.constexpr = TILE.q_stages
    STAGES: gl.constexpr = TILE.stages
    THREADS: gl.constexpr = 32 + 128 * TILE.consumers  # of the producer and all consumers
    POSITIONS: gl.constexpr = TILE.consumers * 64 // TILE.pack
    tile_index = 0
    q_index = 0  # rows of queries: one or two per tile
    kv_index = 0
    mbarrier.wait(shared.tile_bars.ready.index(0), 0)
    document = load_scalar(shared.tiles.index(0), 1)
    while document >= 0:
        tile = read_tile(shared.tiles, tile_index, 1)
        mbarrier.arrive(shared.tile_bars.empty.index(tile_index % TILES_AHEAD), count=1)
        shift = tile.length_k - tile.length_q
        last = gl.minimum(tile.first + POSITIONS, tile.length_q) - 1 + shift
        ranges = _blocks_of_relations(
            tile.first + shift, last, chunk_length, succ_length, TILE.block_n, FLAGS.has_dropout
        )
        queries = QueryRows(tile.end_q, tile.length_q, tile.first, tile.head)
        if ranges.succ_block > 0:
            # out holds the queries at the inter position until the tile's result is stored there.
            q_stage = q_index % Q_STAGES
            mbarrier.wait(shared.q_bars.empty.index(q_stage), ((q_index // Q_STAGES) & 1) ^ 1)
            load_queries(out_desc, shared.q, shared.q_bars.ready, q_stage, queries, TILE)
            q_index += 1
        q_stage = q_index % Q_STAGES
        mbarrier.wait(shared.q_bars.empty.index(q_stage), ((q_index // Q_STAGES) & 1) ^ 1)
        load_queries(q_desc, shared.q, shared.q_bars.ready, q_stage, queries, TILE)
        q_index += 1
        head_kv = tile.head // TILE.group
        for block in range(ranges.blocks):
            stage = kv_index % STAGES
            row = RAGGED - tile.length_k + _first_key(block, ranges, TILE.block_n)
            keys = Rows(tile.end_k, row, head_kv)
            acquire_stage(K_EMPTY, kv_index, STAGES, THREADS)
            if (block >= ranges.succ_block) & (block < ranges.intra_block):
                load_block(k_succ_desc, shared.k.index(stage), shared.k_ready.index(stage), keys)
            else:
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
def _weights(
    s,
    m,
    l,
    block,
    key,
    position,
    ranges,
    chunk_length,
    succ_length,
    bits,
    threshold,
    multiplier,
    s_layout: gl.constexpr,
    dtype: gl.constexpr,
    HAS_DROPOUT: gl.constexpr,
):
    """Masks one block of scores s = q.k [64, BLOCK_N], and updates the online softmax by it.

    `block` is the block's number in `ranges`, `key` the position of its first key, `position` [64]
    that of each query. The other arguments are those of online_softmax.

    Returns:
        The weights p in `dtype`, the factor alpha of the accumulator, and the new m and l, [64, 4].
    """
    clear = gl.where(block < ranges.intra_block, ranges.succ_clear, ranges.intra_clear)
    if key >= gl.where(block < ranges.succ_block, ranges.inter_clear, clear):
        relation = gl.where(block < ranges.intra_block, SUCC, INTRA)
        relation = gl.where(block < ranges.succ_block, INTER, relation)
        first_seen, last_seen = keys_of_query(position, relation, chunk_length, succ_length)
        keys = key + gl.arange(0, s.shape[1], gl.SliceLayout(0, s_layout))
        s = gl.where(keys[None, :] >= first_seen[:, None], s, float("-inf"))
        s = gl.where(keys[None, :] <= last_seen[:, None], s, float("-inf"))
    # HAS_MAX stays False: reusing a known maximum makes these forwards 4 % slower on one long
    # document.
    return online_softmax(s, m, l, bits, threshold, multiplier, s_layout, dtype, HAS_DROPOUT, False)


@gluon.jit
def _consume(
    out_desc,
    shared,
    chunk_length,
    succ_length,
    pointers,
    scalars,
    TILE: gl.constexpr,
    FLAGS: gl.constexpr,
    CONSUMER: gl.constexpr,
):
    """Runs a consumer warpgroup, which computes out and lse of its 64 rows of every tile."""
    CONSUMERS: gl.constexpr = TILE.consumers
    BLOCK_N: gl.constexpr = TILE.block_n
    BLOCK_D: gl.constexpr = TILE.block_d
    Q_STAGES: gl.constexpr = TILE.q_stages
    STAGES: gl.constexpr = TILE.stages
    HAS_DROPOUT: gl.constexpr = FLAGS.has_dropout
    THREADS: gl.constexpr = 32 + 128 * CONSUMERS  # of the producer and all consumers
    POSITIONS: gl.constexpr = CONSUMERS * 64 // TILE.pack
    RUN: gl.constexpr = POSITIONS if POSITIONS < 64 else 64
    FIRST_RUN: gl.constexpr = CONSUMER * (64 // RUN)
    dtype: gl.constexpr = out_desc.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    row_s: gl.constexpr = gl.SliceLayout(1, s_layout)
    row_o: gl.constexpr = gl.SliceLayout(1, o_layout)

    local = gl.arange(0, 64, row_s)
    local_query = local % RUN
    start: gl.constexpr = FIRST_RUN % (POSITIONS // RUN) * RUN  # first position of this warpgroup
    zero = gl.zeros([64, BLOCK_N], gl.float32, s_layout)
    tile_index = 0
    q_index = 0
    result_stage = 0  # stage of the last tile's result
    stage = 0
    phase = 0
    mbarrier.wait(shared.tile_bars.ready.index(0), 0)
    document = load_scalar(shared.tiles.index(0), 4)
    while document >= 0:
        tile = read_tile(shared.tiles, tile_index, 4)
        head = tile.head + FIRST_RUN // (POSITIONS // RUN)
        mbarrier.arrive(shared.tile_bars.empty.index(tile_index % TILES_AHEAD), count=1)
        shift = tile.length_k - tile.length_q
        last = gl.minimum(tile.first + POSITIONS, tile.length_q) - 1 + shift
        ranges = _blocks_of_relations(
            tile.first + shift, last, chunk_length, succ_length, BLOCK_N, HAS_DROPOUT
        )
        succ_block = ranges.succ_block
        first = tile.first + start
        query = first + local_query
        position = query + shift
        tile_head = head + local // RUN
        multiplier = scalars.scale * _LOG2_E
        if pointers.factor is not None:
            multiplier = multiplier * gl.load(pointers.factor + document)
        random = dropout_key(
            pointers, scalars.first_head, document, tile_head, first, local_query, HAS_DROPOUT
        )
        m, l = initial_state(BLOCK_N)
        acc = gl.zeros([64, BLOCK_D], gl.float32, o_layout)
        # Queries at the inter position come first, if the tile has INTER keys.
        inter_stage = q_index % Q_STAGES
        if succ_block > 0:
            mbarrier.wait(shared.q_bars.ready.index(inter_stage), (q_index // Q_STAGES) & 1)
            q_index += 1
        q_stage = q_index % Q_STAGES
        mbarrier.wait(shared.q_bars.ready.index(q_stage), (q_index // Q_STAGES) & 1)
        q_index += 1
        if ranges.blocks > 0:
            mbarrier.wait(shared.k_ready.index(stage), phase)
            s_token = warpgroup_mma(
                shared.q.index(inter_stage * CONSUMERS + CONSUMER),
                shared.k.index(stage).permute((1, 0)),
                zero,
                use_acc=False,
                is_async=True,
            )
            key = _first_key(0, ranges, BLOCK_N)
            bits = bits_from_key(random, key, BLOCK_N, s_layout, HAS_DROPOUT)
            s = warpgroup_mma_wait(0, deps=[s_token])
            release_stage(K_EMPTY, stage, THREADS)
            p, alpha, m, l = _weights(
                s,
                m,
                l,
                0,
                key,
                position,
                ranges,
                chunk_length,
                succ_length,
                bits,
                scalars.threshold,
                multiplier,
                s_layout,
                dtype,
                HAS_DROPOUT,
            )
            # The store of the last tile's result has completed by now.
            tma_store_wait(0)
            mbarrier.arrive(shared.q_bars.empty.index(result_stage), count=1, pred=tile_index > 0)
            p = gl.convert_layout(p, p_layout)
            mbarrier.wait(shared.v_ready.index(stage), phase)
            for block in range(1, ranges.blocks):
                previous_stage = stage
                stage, phase = next_stage(stage, phase, STAGES)
                mbarrier.wait(shared.k_ready.index(stage), phase)
                s_token = warpgroup_mma(
                    shared.q.index(
                        gl.where(block < succ_block, inter_stage, q_stage) * CONSUMERS + CONSUMER
                    ),
                    shared.k.index(stage).permute((1, 0)),
                    zero,
                    use_acc=False,
                    is_async=True,
                )
                acc_token = warpgroup_mma(p, shared.v.index(previous_stage), acc, is_async=True)
                key = _first_key(block, ranges, BLOCK_N)
                bits = bits_from_key(random, key, BLOCK_N, s_layout, HAS_DROPOUT)
                s = warpgroup_mma_wait(1, deps=[s_token])
                release_stage(K_EMPTY, stage, THREADS)
                if block == succ_block:
                    # The last product with the queries at the inter position has completed.
                    mbarrier.arrive(shared.q_bars.empty.index(inter_stage), count=1)
                p_next, alpha, m, l = _weights(
                    s,
                    m,
                    l,
                    block,
                    key,
                    position,
                    ranges,
                    chunk_length,
                    succ_length,
                    bits,
                    scalars.threshold,
                    multiplier,
                    s_layout,
                    dtype,
                    HAS_DROPOUT,
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
            tma_store_wait(0)
            mbarrier.arrive(shared.q_bars.empty.index(result_stage), count=1, pred=tile_index > 0)
        m, l = reduce_rows(m, l, row_s)
        empty = l == 0.0
        whole = gl.where(empty, 1.0, l)
        inverse = gl.convert_layout(scalars.keep_scale / whole, row_o)
        lse = gl.where(empty, float("-inf"), (m + gl.log2(whole)) * _LN_2)
        row = tile_head.to(gl.int64) * scalars.total_q + (tile.end_q - tile.length_q + query)
        gl.store(pointers.lse + row, lse, mask=query < tile.length_q)
        # The result overwrites the queries in shared memory.
        q = shared.q.index(q_stage * CONSUMERS + CONSUMER)
        q.store((acc * inverse[:, None]).to(dtype))
        store_rows(out_desc, q, QueryRows(tile.end_q, tile.length_q, first, head), RUN)
        result_stage = q_stage
        tile_index += 1
        ahead = tile_index % TILES_AHEAD
        mbarrier.wait(shared.tile_bars.ready.index(ahead), (tile_index // TILES_AHEAD) & 1)
        document = load_scalar(shared.tiles.index(ahead * TILE_FIELDS), 4)
    tma_store_wait(0)


@gluon.jit(
    do_not_specialize=[
        "num_items",
        "total_q",
        "chunk_length",
        "succ_length",
        "threshold",
        "first_head",
    ]
)
def dual_chunk_fwd_hopper_kernel(
    q_desc,
    k_desc,
    k_succ_desc,
    v_desc,
    out_desc,
    pointers: ForwardPointers,
    num_items,
    total_q,
    chunk_length,
    succ_length,
    scale,
    threshold,
    keep_scale,
    first_head,
    TILE: gl.constexpr,
    FLAGS: gl.constexpr,
):
    """Computes out and lse, with one persistent program per multiprocessor.

    The roles of the warps are those of varlen_fwd_hopper_kernel. k_succ [Tk, Hk, D] holds the keys
    rotated by -c, from dual_chunk_rotate. logit_scale is [N] float32. At launch, out holds the
    queries rotated to the inter position; each tile reads its rows before it overwrites them. The
    three stages of queries hold both versions of a tile's queries, and one of the next tile.

    chunk_length is c, succ_length the number of SUCC queries at the start of a chunk;
    gluon/structures.py describes the arguments that are not named here.
    Grid: at most one program per multiprocessor.
    """
    dtype: gl.constexpr = q_desc.dtype
    gl.static_assert(TILE.stages <= FORWARD_STAGES, "named barriers overlap")
    shared = allocate_forward(dtype, TILE)
    inputs = SchedulerInputs(
        pointers.cu_seqlens_q, pointers.cu_seqlens_k, pointers.tiles, pointers.counter, num_items
    )
    rows = ConsumerPointers(
        pointers.lse,
        pointers.logit_scale,
        pointers.dropout_seed,
        pointers.document_ids,
        pointers.query_offsets,
    )
    scalars = Scalars(total_q, scale, None, threshold, keep_scale, first_head)
    gl.warp_specialize(
        [
            (
                _consume,
                (out_desc, shared, chunk_length, succ_length, rows, scalars, TILE, FLAGS, 0),
            ),
            (
                _consume,
                (out_desc, shared, chunk_length, succ_length, rows, scalars, TILE, FLAGS, 1),
            ),
            (
                _load,
                (
                    q_desc,
                    out_desc,
                    k_desc,
                    k_succ_desc,
                    v_desc,
                    shared,
                    chunk_length,
                    succ_length,
                    TILE,
                    FLAGS,
                ),
            ),
            (
                schedule_tiles,
                (shared.tiles, shared.tile_bars, inputs, Window(None, -1, 0), TILE, FLAGS),
            ),
        ],
        [4, 1, 1],
        # The loader of two tiles of queries spills with 24, and so do random bits with 232.
        [240, 24, 24] if FLAGS.has_dropout else [232, 40, 40],
    )
