"""The consumer warpgroups of the Hopper backward of dual chunk attention."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from lctrain_kernels.dual_chunk.hopper_bwd_blocks import clear_blocks, first_query
from lctrain_kernels.dual_chunk.hopper_ranges import chunk_begin
from lctrain_kernels.dual_chunk.hopper_structures import ChunkBounds
from lctrain_kernels.dual_chunk.ranges import INTER, INTRA, SUCC
from lctrain_kernels.gluon.backward_pipeline import (
    drain_partial_dq,
    key_offsets,
    start_dq,
    store_partial_dq,
)
from lctrain_kernels.gluon.barriers import (
    BLOCK_EMPTY,
    CONSUMERS,
    DOUT_EMPTY,
    DS_FULL,
    DS_LATER_0,
    DS_LATER_1,
    PRODUCER_AND_CONSUMERS,
    Q_EMPTY,
    barrier_arrive,
    barrier_wait,
    release_stage,
)
from lctrain_kernels.gluon.coordinates import OutputKeys
from lctrain_kernels.gluon.primitives import computed, rounded
from lctrain_kernels.tile.logits import LOG2_E
from lctrain_kernels.varlen.hopper_bwd_dq import add_dq_to_slabs
from lctrain_kernels.varlen.hopper_bwd_products import gradient_of_logits, start_product

_LOG2_E = gl.constexpr(LOG2_E)


@gluon.jit
def _weights(
    s,
    lse,
    block,
    tile,
    bounds,
    multiplier,
    opaque_false,
    RELATION: gl.constexpr,
    BLOCK_M: gl.constexpr,
    s_layout: gl.constexpr,
):
    """Recomputes the attention weights p [keys, queries] = 2^(s * multiplier - lse), masked.

    Args:
        s: Scores k q^T, [keys, queries] float32, in s_layout.
        lse: Base-2 log-sum-exp of the queries, [queries] float32.
        block: Index of the block of queries.
        tile: Tile of keys, a ChunkTile.
        bounds: The warpgroup's first key, and the blocks that need no mask, a ChunkBounds.
        multiplier: Factor of s in the base-2 exponent.
        opaque_false: Condition that is always false, but that the compiler cannot evaluate.
    """
    local_key = gl.arange(0, s.shape[0], gl.SliceLayout(1, s_layout))
    local_query = gl.arange(0, BLOCK_M, gl.SliceLayout(0, s_layout))
    shift = tile.length_k - tile.length_q
    # Keys beyond the end are zero, and 2^(0 - lse) may overflow.
    if (block < bounds.clear_first) | (block >= bounds.clear_end):
        # In queries: the position of the first key, and the end of each key's chunk. Before the
        # loop they would take registers.
        key = bounds.first_key + gl.where(opaque_false, 1, 0)
        diagonal = key - shift
        chunk_end = chunk_begin(key + local_key, bounds.chunk_length) + bounds.chunk_length - shift
        query = local_query + first_query(block, tile.run, RELATION, BLOCK_M)
        first_seen = chunk_end
        if RELATION == INTRA:
            first_seen = local_key + diagonal
        if RELATION == INTER:
            first_seen += bounds.succ_length
        first_seen = gl.where(local_key < tile.end - key, first_seen, tile.length_q)
        s = gl.where(query[None, :] >= first_seen[:, None], s, float("-inf"))
        if RELATION != INTER:
            seen_end = chunk_end + bounds.succ_length if RELATION == SUCC else chunk_end
            s = gl.where(query[None, :] < seen_end[:, None], s, float("-inf"))
    return gl.exp2(s * multiplier - lse[None, :])


@gluon.jit
def _steps_with_dq_warp(
    inputs,
    bounds,
    dk,
    dv,
    multiplier,
    TILE: gl.constexpr,
    RELATION: gl.constexpr,
    FULL_WEIGHTS: gl.constexpr,
    s_layout: gl.constexpr,
    o_layout: gl.constexpr,
    HALF_INDEX: gl.constexpr,
):
    """Runs all steps of a consumer warpgroup; the dQ warp adds partial dq.

    Args:
        inputs: Tensors and coordinates, a BackwardInputs.
        bounds: The warpgroup's first key, and the blocks that need no mask, a ChunkBounds.
        dk: Accumulator of dk, zeros [keys, columns] float32, in o_layout.
        dv: Accumulator of dv, zeros [keys, columns] float32, in o_layout.
        multiplier: Factor of the scores in the base-2 exponent.
        TILE: Tile sizes and head counts of the backward kernel, a BackwardShape.
        RELATION: Range of keys: INTER, SUCC or INTRA.
        FULL_WEIGHTS: Whether weights stay in float32 until dS is computed. Otherwise they wait for
            dP in half precision, which takes half the registers.
        s_layout: Layout of S and dP, [keys, queries].
        o_layout: Layout of dk and dv.
        HALF_INDEX: Index of this warpgroup, 0 or 1.

    Returns:
        dk and dv, unscaled.
    """
    shared = inputs.shared
    dq_bufs = inputs.dq
    ds_bufs = inputs.ds
    tile = inputs.tile
    GROUP: gl.constexpr = TILE.group
    BLOCK_M: gl.constexpr = TILE.block_m
    STAGES: gl.constexpr = TILE.stages
    COLUMNS: gl.constexpr = TILE.block_d // 2
    dtype: gl.constexpr = shared.k.dtype
    TRANSPOSED: gl.constexpr = COLUMNS == 64
    DQ_ROWS: gl.constexpr = COLUMNS if TRANSPOSED else BLOCK_M
    DQ_COLUMNS: gl.constexpr = BLOCK_M if TRANSPOSED else COLUMNS
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DQ_COLUMNS, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    zero_s = gl.zeros([TILE.block_n // 2, BLOCK_M], gl.float32, s_layout)
    zero_q = gl.zeros([DQ_ROWS, DQ_COLUMNS], gl.float32, dq_layout)
    steps = GROUP * tile.blocks
    for step in range(steps):
        stage = step % STAGES
        phase = (step // STAGES) & 1
        block = tile.blocks - 1 - step // GROUP  # in the order of next_block
        opaque_false = block < 0
        mbarrier.wait(shared.q_ready.index(stage), phase)
        s = start_product(shared.k, shared.q, stage, zero_s, opaque_false, HALF_INDEX)
        mbarrier.wait(shared.dout_ready.index(stage), phase)
        dp = start_product(shared.v, shared.dout, stage, zero_s, opaque_false, HALF_INDEX)
        lse = shared.lse.index(stage).load(gl.SliceLayout(0, s_layout))
        s = warpgroup_mma_wait(1, deps=[s])
        p = _weights(
            s,
            lse,
            block,
            tile,
            bounds,
            multiplier,
            opaque_false,
            RELATION,
            BLOCK_M,
            s_layout,
        )
        if FULL_WEIGHTS:
            p = computed(p, opaque_false)
            dp = warpgroup_mma_wait(0, deps=[dp])
            ds = gradient_of_logits(dp, p, shared, stage, dtype, s_layout, False)
            p_operand = gl.convert_layout(rounded(p, dtype), p_layout)
            dv = warpgroup_mma(p_operand, shared.dout.index(stage), dv, is_async=True)
        else:
            p = p.to(dtype)
            p_operand = gl.convert_layout(p, p_layout)
            delta = shared.delta.index(stage).load(gl.SliceLayout(0, s_layout))
            # A scheduling fence that never runs: ptxas does not move the next wait above it.
            barrier_wait(DS_FULL, CONSUMERS, 4, gl.where(opaque_false, 1, 0))
            dp = warpgroup_mma_wait(0, deps=[dp])
            dv = warpgroup_mma(p_operand, shared.dout.index(stage), dv, is_async=True)
            ds = (p.to(gl.float32) * (dp - delta[None, :])).to(dtype)
        ds_operand = gl.convert_layout(ds, p_layout)
        # Two buffers: the half that is written now was read two steps ago, before both warpgroups
        # synchronised at DS_FULL.
        buffer = step & 1
        ds_bufs.index(buffer * 2 + HALF_INDEX).store(ds)
        fence_async_shared()
        barrier_wait(DS_FULL, CONSUMERS, 4)
        dq = start_dq(ds_bufs, shared.k, buffer, zero_q, opaque_false, HALF_INDEX, TRANSPOSED)
        dk = warpgroup_mma(ds_operand, shared.q.index(stage), dk, is_async=True)
        dv = warpgroup_mma_wait(3, deps=[dv])
        release_stage(DOUT_EMPTY, stage, PRODUCER_AND_CONSUMERS)
        dq = warpgroup_mma_wait(1, deps=[dq])
        store_partial_dq(dq, dq_bufs, step, HALF_INDEX, TRANSPOSED)
        dk = warpgroup_mma_wait(0, deps=[dk])
        release_stage(Q_EMPTY, stage, PRODUCER_AND_CONSUMERS)
    drain_partial_dq(steps, HALF_INDEX)
    return dk, dv


@gluon.jit
def _add_dq(
    dq, slabs, step, tile, COLUMN: gl.constexpr, TILE: gl.constexpr, RELATION: gl.constexpr
):
    """Adds a warpgroup's columns of a step's partial dq from registers to the float32 buffer.

    Args:
        dq: Partial dq, [block_m, columns] float32.
        slabs: Slabs of the document of the group's first head, a DqSlabs.
        step: Index of the step; nothing is added for -1.
        tile: Tile of keys, a ChunkTile.
        COLUMN: First column.
        TILE: Tile sizes and head counts of the backward kernel, a BackwardShape.
    """
    known = gl.maximum(step, 0)
    query = first_query(tile.blocks - 1 - known // TILE.group, tile.run, RELATION, TILE.block_m)
    slab = known % TILE.group * slabs.per_head + query // TILE.slab_rows
    rows = gl.where(step >= 0, tile.length_q - query, 0)
    add_dq_to_slabs(dq, slabs, slab, rows, COLUMN, TILE)


@gluon.jit
def _later_steps(
    inputs,
    bounds,
    dk,
    dv,
    multiplier,
    TILE: gl.constexpr,
    RELATION: gl.constexpr,
    s_layout: gl.constexpr,
    o_layout: gl.constexpr,
    HALF_INDEX: gl.constexpr,
):
    """Runs all steps of a consumer warpgroup, and adds partial dq of a step in the next one.

    The order of operations is that of later_steps in varlen/hopper_bwd_later.py, which explains it.
    The arguments and results are those of _steps_with_dq_warp. With FULL_WEIGHTS its dk and dv have
    the same bits.
    """
    shared = inputs.shared
    ds_bufs = inputs.ds
    tile = inputs.tile
    GROUP: gl.constexpr = TILE.group
    BLOCK_M: gl.constexpr = TILE.block_m
    STAGES: gl.constexpr = TILE.stages
    COLUMNS: gl.constexpr = TILE.block_d // 2
    COLUMN: gl.constexpr = HALF_INDEX * COLUMNS
    OURS: gl.constexpr = DS_LATER_0 if HALF_INDEX == 0 else DS_LATER_1
    THEIRS: gl.constexpr = DS_LATER_1 if HALF_INDEX == 0 else DS_LATER_0
    dtype: gl.constexpr = shared.k.dtype
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    zero_s = gl.zeros([TILE.block_n // 2, BLOCK_M], gl.float32, s_layout)
    zero_q = gl.zeros([BLOCK_M, COLUMNS], gl.float32, dq_layout)
    steps = GROUP * tile.blocks
    for step in range(steps):
        stage = step % STAGES
        phase = (step // STAGES) & 1
        block = tile.blocks - 1 - step // GROUP  # in the order of next_block
        opaque_false = block < 0
        mbarrier.wait(shared.q_ready.index(stage), phase)
        s = start_product(shared.k, shared.q, stage, zero_s, opaque_false, HALF_INDEX)
        mbarrier.wait(shared.dout_ready.index(stage), phase)
        dp = start_product(shared.v, shared.dout, stage, zero_s, opaque_false, HALF_INDEX)
        s = warpgroup_mma_wait(1, deps=[s])
        lse = shared.lse.index(stage).load(gl.SliceLayout(0, s_layout))
        p = _weights(
            s,
            lse,
            block,
            tile,
            bounds,
            multiplier,
            opaque_false,
            RELATION,
            BLOCK_M,
            s_layout,
        )
        p = computed(p, opaque_false)
        dp = warpgroup_mma_wait(0, deps=[dp])
        ds = gradient_of_logits(dp, p, shared, stage, dtype, s_layout, False)
        ds_bufs.index((step & 3) * 2 + HALF_INDEX).store(ds)
        p_operand = gl.convert_layout(rounded(p, dtype), p_layout)
        dv = warpgroup_mma(p_operand, shared.dout.index(stage), dv, is_async=True)
        fence_async_shared()
        barrier_arrive(OURS + (step & 3), CONSUMERS, 4)
        ds_operand = gl.convert_layout(ds, p_layout)
        before = (step + 3) & 3
        barrier_wait(THEIRS + before, CONSUMERS, 4, gl.where(step > 0, 1, 0))
        dq = start_dq(ds_bufs, shared.k, before, zero_q, opaque_false, HALF_INDEX, False)
        dv = warpgroup_mma_wait(1, deps=[dv])
        dk = warpgroup_mma(ds_operand, shared.q.index(stage), dk, is_async=True)
        dq = warpgroup_mma_wait(1, deps=[dq])
        _add_dq(dq, inputs.dq, step - 1, tile, COLUMN, TILE, RELATION)
        dk = warpgroup_mma_wait(0, deps=[dk])
        release_stage(BLOCK_EMPTY, stage, PRODUCER_AND_CONSUMERS)
    before = (steps + 3) & 3
    barrier_wait(THEIRS + before, CONSUMERS, 4, gl.where(steps > 0, 1, 0))
    dq = start_dq(ds_bufs, shared.k, before, zero_q, tile.blocks < 0, HALF_INDEX, False)
    dq = warpgroup_mma_wait(0, deps=[dq])
    _add_dq(dq, inputs.dq, steps - 1, tile, COLUMN, TILE, RELATION)
    return dk, dv


@gluon.jit
def compute(
    inputs,
    scale,
    TILE: gl.constexpr,
    RELATION: gl.constexpr,
    FULL_WEIGHTS: gl.constexpr,
    HALF_INDEX: gl.constexpr,
):
    """Runs a consumer warpgroup: dk, dv of half of the tile's keys, half of the columns of dq.

    Args:
        inputs: Tensors and coordinates, a BackwardInputs.
        scale: Factor of q.k.
        TILE: Tile sizes and head counts of the backward kernel, a BackwardShape.
        RELATION: Range of keys: INTER, SUCC or INTRA.
        FULL_WEIGHTS: As in _steps_with_dq_warp; always true with TILE.dq_from_registers.
        HALF_INDEX: Index of this warpgroup, 0 or 1.
    """
    pointers = inputs.results
    strides = inputs.strides
    tile = inputs.tile
    chunk_length = inputs.chunk_length
    succ_length = inputs.succ_length
    BLOCK_M: gl.constexpr = TILE.block_m
    BLOCK_D: gl.constexpr = TILE.block_d
    HALF: gl.constexpr = TILE.block_n // 2
    dtype: gl.constexpr = inputs.shared.k.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    first_key = tile.first + HALF_INDEX * HALF
    clear_first, clear_end = clear_blocks(
        first_key, HALF, tile, chunk_length, succ_length, RELATION, BLOCK_M
    )
    bounds = ChunkBounds(first_key, clear_first, clear_end, chunk_length, succ_length)
    dk = gl.zeros([HALF, BLOCK_D], gl.float32, o_layout)
    dv = gl.zeros([HALF, BLOCK_D], gl.float32, o_layout)
    mbarrier.wait(inputs.shared.kv_ready, 0)
    if TILE.dq_from_registers:
        dk, dv = _later_steps(
            *(inputs, bounds, dk, dv, scale * _LOG2_E),
            TILE,
            RELATION,
            s_layout,
            o_layout,
            HALF_INDEX,
        )
    else:
        dk, dv = _steps_with_dq_warp(
            *(inputs, bounds, dk, dv, scale * _LOG2_E),
            TILE,
            RELATION,
            FULL_WEIGHTS,
            s_layout,
            o_layout,
            HALF_INDEX,
        )
    keys = OutputKeys(first_key, tile.end, tile.begin_k, tile.head_kv)
    offsets, inside = key_offsets(
        keys, strides.token, strides.head, TILE.head_dim, o_layout, HALF, BLOCK_D
    )
    # Keys of all chunks but the document's last one, to whose gradients other launches add.
    keys = OutputKeys(
        first_key, chunk_begin(tile.length_k - 1, chunk_length), tile.begin_k, tile.head_kv
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
