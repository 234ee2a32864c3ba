"""The consumer warpgroups of the Hopper backward of varlen attention.

Each of two warpgroups computes dk and dv of half of a tile's keys, and half of the columns of the
tile's partial dq.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from lctrain_kernels.gluon.backward_pipeline import (
    drain_partial_dq,
    first_visit,
    key_offsets,
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
from lctrain_kernels.gluon.coordinates import KeyBounds, OutputKeys
from lctrain_kernels.gluon.primitives import (
    is_kept,
    rounded,
    scheduling_fence,
    tanh,
)
from lctrain_kernels.tile.logits import LOG2_E
from lctrain_kernels.varlen.hopper_bwd_later import later_steps
from lctrain_kernels.varlen.hopper_bwd_narrow import narrow_steps
from lctrain_kernels.varlen.hopper_bwd_plain import plain_steps
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
def block_weights(
    s,
    bits,
    lse,
    query,
    bounds,
    threshold,
    factors,
    opaque_false,
    dtype: gl.constexpr,
    s_layout: gl.constexpr,
    FLAGS: gl.constexpr,
):
    """Returns the weights p, and p times the softcap's derivative, both [keys, queries].

    Both are in half precision, and negative where dropout drops the weight. Without a softcap they
    are equal.

    Args:
        s: Scores k q^T, [keys, queries] float32.
        bits: Random words that draw_block_bits returned.
        lse: Base-2 log-sum-exp of the queries, [queries] float32.
        query: Position in the document of the block's first query.
        bounds: Window and document end relative to the warpgroup's first key, a KeyBounds.
        threshold: A weight is dropped if the 16 bits taken from its word are below this number.
        factors: Softmax scale and softcap, a Factors.
        opaque_false: Condition that is always false, but that the compiler cannot evaluate.
        dtype: Dtype of the results, bfloat16 or float16.
        s_layout: Layout of s.
        FLAGS: Features beyond plain attention, a tile.structures.Flags.
    """
    multiplier = factors.scale * _LOG2_E
    if FLAGS.has_softcap:
        bounded = tanh(s * (factors.scale / factors.softcap))
        s = bounded * (factors.softcap * _LOG2_E)
        multiplier = 1.0
    p = keys_weights(s, lse, query, bounds, multiplier, 64, s_layout, FLAGS)
    if FLAGS.has_dropout:
        local_key = gl.arange(0, 64, gl.SliceLayout(1, s_layout))
        p = gl.where(is_kept(bits, local_key[:, None], threshold), p, -p)
    if FLAGS.has_softcap:
        weights = rounded(p * (1.0 - bounded * bounded), dtype)
        return scheduling_fence(rounded(p, dtype), opaque_false), weights
    else:
        p = scheduling_fence(rounded(p, dtype), opaque_false)
        return p, p


@gluon.jit
def _accumulate(
    shared,
    ds_bufs,
    step,
    p,
    weights,
    zero,
    dk,
    dv,
    opaque_false,
    TILE: gl.constexpr,
    FLAGS: gl.constexpr,
    s_layout: gl.constexpr,
    o_layout: gl.constexpr,
    HALF_INDEX: gl.constexpr,
):
    """Computes dS of a step, adds p^T dout to dv, and issues the product that adds dS q to dk.

    dS is also stored in shared memory, from which both warpgroups compute their columns of dq.

    Args:
        shared: Shared memory of the kernel, a BackwardBuffers.
        ds_bufs: dS of two steps and both warpgroups, [4, keys, queries].
        step: Index of the step.
        p: Weights from block_weights, [keys, queries].
        weights: p times the softcap's derivative, from block_weights.
        zero: Accumulator of zeros, [keys, queries] float32.
        dk: Accumulator of dk, [keys, columns] float32.
        dv: Accumulator of dv, [keys, columns] float32.
        opaque_false: Condition that is always false, but that the compiler cannot evaluate.
        TILE: Tile sizes and head counts of the backward kernel, a BackwardShape.
        FLAGS: Features beyond plain attention, a tile.structures.Flags.
        s_layout: Layout of the scores.
        o_layout: Layout of dk and dv.
        HALF_INDEX: Index of this warpgroup and of its half of the keys, 0 or 1.

    Returns:
        dk, whose product is still in flight, and dv.
    """
    STAGES: gl.constexpr = TILE.stages
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    stage = step % STAGES
    mbarrier.wait(shared.dout_ready.index(stage), (step // STAGES) & 1)
    dp = start_product(shared.v, shared.dout, stage, zero, opaque_false, HALF_INDEX)
    seen = gl.convert_layout(kept_weights(p, FLAGS.has_dropout), p_layout)
    dv = warpgroup_mma(seen, shared.dout.index(stage), dv, is_async=True)
    dp = warpgroup_mma_wait(1, deps=[dp])
    dtype: gl.constexpr = shared.k.dtype
    ds = gradient_of_logits(dp, weights, shared, stage, dtype, s_layout, FLAGS.has_dropout)
    ds_operand = gl.convert_layout(ds, p_layout)
    # dS has two buffers. The other warpgroup read this one before it stored its last dS.
    ds_bufs.index((step & 1) * 2 + HALF_INDEX).store(ds)
    fence_async_shared()
    barrier_arrive(DS_READY + 2 * (step & 1) + HALF_INDEX, CONSUMERS, 4)
    dv = warpgroup_mma_wait(0, deps=[dv])
    return warpgroup_mma(ds_operand, shared.q.index(stage), dk, is_async=True), dv


class ComputeInputs(NamedTuple):
    """Inputs of a consumer warpgroup of the backward.

    Attributes:
        shared: Shared memory of the kernel, a BackwardBuffers.
        dq_out: Two float32 shared-memory buffers of partial dq, or DqSlabs.
        ds: dS of two steps and both warpgroups, [4, 64, block_m].
        results: Pointers to which dk and dv are stored, a KeyGradients.
        tile: Tile of keys that the program works on, a KeyTile.
        window: Keys visible to the left and right of each query, a Bounds.
        dropout: Seed, document and threshold of dropout, a DropoutInputs.
        factors: Factors of logits, weights and gradients, a Factors.
    """

    shared: Any
    dq_out: Any
    ds: Any
    results: Any
    tile: Any
    window: Any
    dropout: Any
    factors: Any


@gluon.jit
def _overlapped_steps(
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
    """Runs all steps of a consumer warpgroup, with every feature; see plain_steps.

    Steps overlap: the weights of the next step are computed while the product of dq runs, and wait
    in half precision. The two warpgroups may be one step apart, so the products of one run while
    the other issues none.

    The tile has at least one step. Results and the other arguments are those of plain_steps.

    Args:
        first_key: Position in the document of the warpgroup's first key.
    """
    shared = inputs.shared
    dq_out = inputs.dq_out
    ds_bufs = inputs.ds
    tile = inputs.tile
    dropout = inputs.dropout
    factors = inputs.factors
    GROUP: gl.constexpr = TILE.group
    BLOCK_M: gl.constexpr = TILE.block_m
    STAGES: gl.constexpr = TILE.stages
    BY_HEAD: gl.constexpr = TILE.dq_from_registers and (TILE.block_d != 128 or TILE.head_dim <= 96)
    HAS_DROPOUT: gl.constexpr = FLAGS.has_dropout
    DQ_ROWS: gl.constexpr = TILE.block_d // 2 if TRANSPOSED else BLOCK_M
    DQ_COLUMNS: gl.constexpr = dq_layout.instr_shape[1]
    dtype: gl.constexpr = shared.k.dtype
    column_s: gl.constexpr = gl.SliceLayout(0, s_layout)
    random = seed_words(dropout, HAS_DROPOUT)
    zero_s = gl.zeros([TILE.block_n // 2, BLOCK_M], gl.float32, s_layout)
    zero_q = gl.zeros([DQ_ROWS, DQ_COLUMNS], gl.float32, dq_layout)
    steps = GROUP * (tile.high - tile.low)
    visit = first_visit(tile, BY_HEAD)
    opaque_false = tile.high < 0
    query = visit.block * BLOCK_M
    mbarrier.wait(shared.q_ready.index(0), 0)
    s = start_product(shared.k, shared.q, 0, zero_s, opaque_false, HALF_INDEX)
    lse = shared.lse.index(0).load(column_s)
    bits = draw_block_bits(random, tile.head_kv * GROUP, query, first_key, s_layout, HAS_DROPOUT)
    s = warpgroup_mma_wait(0, deps=[s])
    p, weights = block_weights(
        s,
        bits,
        lse,
        query,
        bounds,
        dropout.threshold,
        factors,
        opaque_false,
        dtype,
        s_layout,
        FLAGS,
    )
    for step in range(steps - 1):
        stage = step % STAGES
        opaque_false = visit.block < 0
        dk, dv = _accumulate(
            *(shared, ds_bufs, step, p, weights, zero_s, dk, dv, opaque_false),
            TILE,
            FLAGS,
            s_layout,
            o_layout,
            HALF_INDEX,
        )
        following = (step + 1) % STAGES
        mbarrier.wait(shared.q_ready.index(following), ((step + 1) // STAGES) & 1)
        s = start_product(shared.k, shared.q, following, zero_s, opaque_false, HALF_INDEX)
        barrier_wait(DS_READY + 2 * (step & 1) + 1 - HALF_INDEX, CONSUMERS, 4)
        dq = start_dq(ds_bufs, shared.k, step & 1, zero_q, opaque_false, HALF_INDEX, TRANSPOSED)
        if HAS_DROPOUT:
            # dq is stored before the random bits are drawn: both need the same registers.
            dk, s, dq = warpgroup_mma_wait(0, deps=[dk, s, dq])
            emit_dq(dq, dq_out, step, visit, tile, TILE, HALF_INDEX, TRANSPOSED)
        else:
            dk, s = warpgroup_mma_wait(1, deps=[dk, s])
        lse = shared.lse.index(following).load(column_s)
        release_stage(BLOCK_EMPTY, stage, PRODUCER_AND_CONSUMERS)
        then = next_visit(visit, tile, GROUP, BY_HEAD)
        query = then.block * BLOCK_M
        head = tile.head_kv * GROUP + then.member
        bits = draw_block_bits(random, head, query, first_key, s_layout, HAS_DROPOUT)
        p, weights = block_weights(
            s,
            bits,
            lse,
            query,
            bounds,
            dropout.threshold,
            factors,
            opaque_false,
            dtype,
            s_layout,
            FLAGS,
        )
        if not HAS_DROPOUT:
            dq = warpgroup_mma_wait(0, deps=[dq])
            emit_dq(dq, dq_out, step, visit, tile, TILE, HALF_INDEX, TRANSPOSED)
        visit = next_visit(visit, tile, GROUP, BY_HEAD)
    step = steps - 1
    opaque_false = visit.block < 0
    dk, dv = _accumulate(
        *(shared, ds_bufs, step, p, weights, zero_s, dk, dv, opaque_false),
        TILE,
        FLAGS,
        s_layout,
        o_layout,
        HALF_INDEX,
    )
    barrier_wait(DS_READY + 2 * (step & 1) + 1 - HALF_INDEX, CONSUMERS, 4)
    dq = start_dq(ds_bufs, shared.k, step & 1, zero_q, opaque_false, HALF_INDEX, TRANSPOSED)
    dk, dq = warpgroup_mma_wait(0, deps=[dk, dq])
    release_stage(BLOCK_EMPTY, step % STAGES, PRODUCER_AND_CONSUMERS)
    emit_dq(dq, dq_out, step, visit, tile, TILE, HALF_INDEX, TRANSPOSED)
    return dk, dv


@gluon.jit
def compute(
    inputs,
    TILE: gl.constexpr,
    FLAGS: gl.constexpr,
    HALF_INDEX: gl.constexpr,
):
    """Runs a consumer warpgroup of the backward kernel.

    A warpgroup computes dk and dv of half of the tile's keys, and half of the columns of each
    partial dq. A step is one block of queries of one head.

    Args:
        inputs: Tensors, coordinates and factors, a ComputeInputs.
        TILE: Tile sizes and head counts of the backward kernel, a BackwardShape.
        FLAGS: Features beyond plain attention, a tile.structures.Flags.
        HALF_INDEX: Index of this warpgroup, 0 or 1.
    """
    results = inputs.results
    tile = inputs.tile
    factors = inputs.factors
    BLOCK_M: gl.constexpr = TILE.block_m
    BLOCK_D: gl.constexpr = TILE.block_d
    HALF: gl.constexpr = TILE.block_n // 2
    COLUMNS: gl.constexpr = BLOCK_D // 2
    PLAIN: gl.constexpr = not FLAGS.has_softcap and (BLOCK_D == 64 or not FLAGS.has_dropout)
    dtype: gl.constexpr = inputs.shared.k.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    TRANSPOSED: gl.constexpr = COLUMNS == 64 and not TILE.dq_from_registers
    DQ_COLUMNS: gl.constexpr = 64 if TRANSPOSED else COLUMNS
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DQ_COLUMNS, 16])

    first_key = tile.first + HALF_INDEX * HALF
    keys_here = tile.length_k - first_key
    bounds = KeyBounds(
        keys_here,
        keys_here - tile.length_q + inputs.window.right,
        keys_here - tile.length_q - inputs.window.left,
    )
    keys = OutputKeys(first_key, tile.length_k, tile.begin_k, tile.head_kv)
    NARROW: gl.constexpr = BLOCK_D == 128 and TILE.head_dim <= 96
    mbarrier.wait(inputs.shared.kv_ready, 0)
    if PLAIN and NARROW and TILE.dq_from_registers:
        narrow_steps(inputs, bounds, keys, TILE, FLAGS, HALF_INDEX)
    else:
        dk = gl.zeros([HALF, BLOCK_D], gl.float32, o_layout)
        dv = gl.zeros([HALF, BLOCK_D], gl.float32, o_layout)
        steps = TILE.group * (tile.high - tile.low)
        if PLAIN and TILE.dq_from_registers and BLOCK_D == 128:
            dk, dv = later_steps(
                *(inputs, bounds, dk, dv), TILE, FLAGS, s_layout, o_layout, dq_layout, HALF_INDEX
            )
        elif PLAIN:
            dk, dv = plain_steps(
                *(inputs, bounds, dk, dv, first_key),
                TILE,
                FLAGS,
                s_layout,
                o_layout,
                dq_layout,
                HALF_INDEX,
                TRANSPOSED,
            )
        elif steps > 0:
            dk, dv = _overlapped_steps(
                *(inputs, bounds, dk, dv, first_key),
                TILE,
                FLAGS,
                s_layout,
                o_layout,
                dq_layout,
                HALF_INDEX,
                TRANSPOSED,
            )
        if not TILE.dq_from_registers:
            drain_partial_dq(steps, HALF_INDEX)
        offsets, inside = key_offsets(
            keys, results.token, results.head, TILE.head_dim, o_layout, HALF, BLOCK_D
        )
        gl.store(results.dv + offsets, (dv * factors.keep_scale).to(dtype), mask=inside)
        dk = dk * (factors.scale * factors.keep_scale)
        gl.store(results.dk + offsets, dk.to(dtype), mask=inside)
