"""Steps of the Hopper backward of varlen attention without softcap and, above D = 64, dropout."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from lctrain_kernels.gluon.backward_pipeline import (
    first_visit,
    keys_weights,
    next_visit,
    start_dq,
)
from lctrain_kernels.gluon.barriers import (
    BLOCK_EMPTY,
    CONSUMERS,
    DS_READY,
    PRODUCER_AND_CONSUMERS,
    barrier_arrive,
    barrier_wait,
    release_stage,
)
from lctrain_kernels.gluon.primitives import computed, is_kept, rounded
from lctrain_kernels.tile.logits import LOG2_E
from lctrain_kernels.varlen.hopper_bwd_products import (
    draw_block_bits,
    emit_dq,
    gradient_of_logits,
    kept_weights,
    seed_words,
    start_product,
)

_LOG2_E = gl.constexpr(LOG2_E)


@gluon.jit
def plain_steps(
    inputs,
    bounds,
    dk,
    dv,
    first_key,
    TILE: gl.constexpr,
    FLAGS: gl.constexpr,
    s_layout: gl.constexpr,
    o_layout: gl.constexpr,
    dq_layout: gl.constexpr,
    HALF_INDEX: gl.constexpr,
    TRANSPOSED: gl.constexpr,
):
    """Runs all steps of a consumer warpgroup, one after the other.

    S and dP of a step are issued together, and the weights are computed while dP runs. Weights stay
    in float32 until dS is computed. The products of dv, dq and dk overlap. The two warpgroups meet
    once a step, before dq.

    Args:
        inputs: Tensors, coordinates and factors, a ComputeInputs.
        bounds: Window and document end relative to the warpgroup's first key, a KeyBounds.
        dk: Accumulator of dk, zeros [keys, columns] float32, in o_layout.
        dv: Accumulator of dv, zeros [keys, columns] float32, in o_layout.
        first_key: Position in the document of the warpgroup's first key.
        TILE: Tile sizes and head counts of the backward kernel, a BackwardShape.
        FLAGS: Features beyond plain attention, a tile.structures.Flags.
        s_layout: Layout of S and dP, [keys, queries].
        o_layout: Layout of dk and dv.
        dq_layout: Layout of this warpgroup's half of partial dq.
        HALF_INDEX: Index of this warpgroup, 0 or 1.
        TRANSPOSED: Whether partial dq is [columns, queries], as in start_dq.

    Returns:
        dk and dv, without the factors of scale and dropout.
    """
    shared = inputs.shared
    ds_bufs = inputs.ds
    tile = inputs.tile
    GROUP: gl.constexpr = TILE.group
    BLOCK_M: gl.constexpr = TILE.block_m
    STAGES: gl.constexpr = TILE.stages
    BY_HEAD: gl.constexpr = TILE.dq_from_registers and (TILE.block_d != 128 or TILE.head_dim <= 96)
    DQ_ROWS: gl.constexpr = TILE.block_d // 2 if TRANSPOSED else 64
    DQ_COLUMNS: gl.constexpr = dq_layout.instr_shape[1]
    dtype: gl.constexpr = shared.k.dtype
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    zero_s = gl.zeros([TILE.block_n // 2, BLOCK_M], gl.float32, s_layout)
    zero_q = gl.zeros([DQ_ROWS, DQ_COLUMNS], gl.float32, dq_layout)
    HAS_DROPOUT: gl.constexpr = FLAGS.has_dropout
    dropout = inputs.dropout
    random = seed_words(dropout, HAS_DROPOUT)
    multiplier = inputs.factors.scale * _LOG2_E
    visit = first_visit(tile, BY_HEAD)
    for step in range(GROUP * (tile.high - tile.low)):
        stage = step % STAGES
        phase = (step // STAGES) & 1
        opaque_false = visit.block < 0
        mbarrier.wait(shared.q_ready.index(stage), phase)
        s = start_product(shared.k, shared.q, stage, zero_s, opaque_false, HALF_INDEX)
        mbarrier.wait(shared.dout_ready.index(stage), phase)
        dp = start_product(shared.v, shared.dout, stage, zero_s, opaque_false, HALF_INDEX)
        query = visit.block * BLOCK_M
        head = tile.head_kv * GROUP + visit.member
        bits = draw_block_bits(random, head, query, first_key, s_layout, HAS_DROPOUT)
        s = warpgroup_mma_wait(1, deps=[s])
        lse = shared.lse.index(stage).load(gl.SliceLayout(0, s_layout))
        p = keys_weights(s, lse, query, bounds, multiplier, BLOCK_M, s_layout, FLAGS)
        if HAS_DROPOUT:
            local_key = gl.arange(0, 64, gl.SliceLayout(1, s_layout))
            p = gl.where(is_kept(bits, local_key[:, None], dropout.threshold), p, -p)
        p = computed(p, opaque_false)
        dp = warpgroup_mma_wait(0, deps=[dp])
        ds = gradient_of_logits(dp, p, shared, stage, dtype, s_layout, HAS_DROPOUT)
        # dS has two buffers. The other warpgroup read this one before it stored its last dS.
        ds_bufs.index((step & 1) * 2 + HALF_INDEX).store(ds)
        seen = gl.convert_layout(rounded(kept_weights(p, HAS_DROPOUT), dtype), p_layout)
        dv = warpgroup_mma(seen, shared.dout.index(stage), dv, is_async=True)
        fence_async_shared()
        barrier_arrive(DS_READY + 2 * (step & 1) + HALF_INDEX, CONSUMERS, 4)
        ds_operand = gl.convert_layout(ds, p_layout)
        barrier_wait(DS_READY + 2 * (step & 1) + 1 - HALF_INDEX, CONSUMERS, 4)
        dq = start_dq(ds_bufs, shared.k, step & 1, zero_q, opaque_false, HALF_INDEX, TRANSPOSED)
        dv = warpgroup_mma_wait(1, deps=[dv])
        dk = warpgroup_mma(ds_operand, shared.q.index(stage), dk, is_async=True)
        dq = warpgroup_mma_wait(1, deps=[dq])
        emit_dq(dq, inputs.dq_out, step, visit, tile, TILE, HALF_INDEX, TRANSPOSED)
        dk = warpgroup_mma_wait(0, deps=[dk])
        release_stage(BLOCK_EMPTY, stage, PRODUCER_AND_CONSUMERS)
        visit = next_visit(visit, tile, GROUP, BY_HEAD)
    return dk, dv
