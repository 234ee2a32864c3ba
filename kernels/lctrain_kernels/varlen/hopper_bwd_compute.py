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
    key_offsets,
    keys_weights,
    start_dq,
    store_partial_dq,
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
    draw_bits,
    dropout_head,
    is_kept,
    load_key,
    rematerialised,
    rounded,
    scheduling_fence,
    tanh,
)
from lctrain_kernels.gluon.structures import SeedWords
from lctrain_kernels.tile.logits import LOG2_E
from lctrain_kernels.varlen.hopper_bwd_dq import add_dq_from_registers

_LOG2_E = gl.constexpr(LOG2_E)


@gluon.jit
def _start_product(of_keys, of_queries, stage, zero, opaque_false, HALF_INDEX: gl.constexpr):
    """Issues the asynchronous product S = k q^T or dP = v dout^T, [keys, queries], without waiting.

    Args:
        of_keys: Two halves of the tile's keys or values in shared memory, [2, keys, columns].
        of_queries: Queries or dout in shared memory, [stages, queries, columns].
        stage: Pipeline stage of the block of queries.
        zero: Accumulator of zeros, [keys, queries] float32.
        opaque_false: Condition that is always false, but that the compiler cannot evaluate.
        HALF_INDEX: Index of this warpgroup's half of the keys, 0 or 1.
    """
    return warpgroup_mma(
        rematerialised(of_keys, HALF_INDEX, opaque_false),
        of_queries.index(stage).permute((1, 0)),
        zero,
        use_acc=False,
        is_async=True,
    )


@gluon.jit
def _draw_bits(random, head, query, first_key, s_layout: gl.constexpr, HAS_DROPOUT: gl.constexpr):
    """Draws one random 32-bit word per weight of a block, [keys, queries] uint32.

    Without dropout the result is 0. The caller has started the block's product S, with which the
    drawing overlaps.

    Args:
        random: Inputs of the dropout RNG, a SeedWords.
        head: Index of the query head in the call.
        query: Position in the document of the block's first query.
        first_key: Position in the document of the warpgroup's first key.
        s_layout: Layout of S.
        HAS_DROPOUT: Whether attention weights are dropped.
    """
    bits = 0
    if HAS_DROPOUT:
        bits = draw_bits(
            random.key_0,
            random.key_1,
            random.document,
            dropout_head(head, random.first_head).to(gl.uint32),
            query + random.query_offset,
            gl.arange(0, 64, gl.SliceLayout(0, s_layout))[None, :],
            first_key,
            gl.arange(0, 64, gl.SliceLayout(1, s_layout))[:, None],
        )
    return bits


@gluon.jit
def _weights(
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
        bits: Random words that _draw_bits returned.
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
def _kept_weights(p, HAS_DROPOUT: gl.constexpr):
    """Returns the weights p that _weights returned, with dropped (negative) ones set to 0."""
    if HAS_DROPOUT:
        p = gl.where(p < 0.0, gl.zeros_like(p), p)
    return p


@gluon.jit
def _emit_dq(
    dq,
    dq_out,
    step,
    length_q,
    last,
    TILE: gl.constexpr,
    HALF_INDEX: gl.constexpr,
    TRANSPOSED: gl.constexpr,
):
    """Passes a warpgroup's columns of partial dq on, so that they are added to dq's float32 buffer.

    Partial dq goes to the dQ warp through shared memory. With TILE.dq_from_registers this warpgroup
    adds it to the buffer itself.

    Args:
        dq: Half of the columns of the step's partial dq, float32.
        dq_out: Shared-memory buffers for the dQ warp; DqSlabs with TILE.dq_from_registers.
        step: Index of the step.
        length_q: Number of queries of the document.
        last: Index of the last block of queries.
        TILE: Tile sizes and head counts of the backward kernel, a BackwardShape.
        HALF_INDEX: Index of the warpgroup and of its half of the columns, 0 or 1.
        TRANSPOSED: Whether dq is [columns, queries], as in start_dq.
    """
    if TILE.dq_from_registers:
        back = step // TILE.group
        slabs = step % TILE.group * dq_out.per_head - back * (TILE.block_m // 16)
        rows = length_q - (last - back) * TILE.block_m
        slab_ptr = dq_out.pointer + slabs.to(gl.int64) * (16 * TILE.head_dim)
        add_dq_from_registers(dq, slab_ptr, rows, HALF_INDEX, TILE.head_dim)
    else:
        store_partial_dq(dq, dq_out, step, HALF_INDEX, TRANSPOSED)


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
        p: Weights from _weights, [keys, queries].
        weights: p times the softcap's derivative, from _weights.
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
    dp = _start_product(shared.v, shared.dout, stage, zero, opaque_false, HALF_INDEX)
    seen = gl.convert_layout(_kept_weights(p, FLAGS.has_dropout), p_layout)
    dv = warpgroup_mma(seen, shared.dout.index(stage), dv, is_async=True)
    dp = warpgroup_mma_wait(1, deps=[dp])
    delta = shared.delta.index(stage).load(gl.SliceLayout(0, s_layout))
    weights = weights.to(gl.float32)
    if FLAGS.has_dropout:
        dp = gl.where(weights > 0.0, dp, 0.0)
        weights = gl.abs(weights)
    ds = (weights * (dp - delta[None, :])).to(shared.k.dtype)
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
def compute(
    inputs,
    TILE: gl.constexpr,
    FLAGS: gl.constexpr,
    HALF_INDEX: gl.constexpr,
):
    """Runs a consumer warpgroup of the backward kernel.

    A warpgroup computes dk and dv of half of the tile's keys, and half of the columns of dq. A step
    is one block of queries of one head. Steps overlap: the weights of the next step are computed
    while the product of dq runs. The two warpgroups may be one step apart, so the products of one
    run while the other issues none.

    Args:
        inputs: Tensors, coordinates and factors, a ComputeInputs.
        TILE: Tile sizes and head counts of the backward kernel, a BackwardShape.
        FLAGS: Features beyond plain attention, a tile.structures.Flags.
        HALF_INDEX: Index of this warpgroup, 0 or 1.
    """
    shared = inputs.shared
    dq_out = inputs.dq_out
    ds_bufs = inputs.ds
    results = inputs.results
    tile = inputs.tile
    dropout = inputs.dropout
    factors = inputs.factors
    high = tile.high
    GROUP: gl.constexpr = TILE.group
    BLOCK_M: gl.constexpr = TILE.block_m
    BLOCK_D: gl.constexpr = TILE.block_d
    STAGES: gl.constexpr = TILE.stages
    HAS_DROPOUT: gl.constexpr = FLAGS.has_dropout
    HALF: gl.constexpr = TILE.block_n // 2
    COLUMNS: gl.constexpr = BLOCK_D // 2
    dtype: gl.constexpr = shared.k.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    TRANSPOSED: gl.constexpr = COLUMNS == 64 and not TILE.dq_from_registers
    DQ_ROWS: gl.constexpr = COLUMNS if TRANSPOSED else BLOCK_M
    DQ_COLUMNS: gl.constexpr = BLOCK_M if TRANSPOSED else COLUMNS
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DQ_COLUMNS, 16])
    column_s: gl.constexpr = gl.SliceLayout(0, s_layout)

    first_key = tile.first + HALF_INDEX * HALF
    keys_here = tile.length_k - first_key
    bounds = KeyBounds(
        keys_here,
        keys_here - tile.length_q + inputs.window.right,
        keys_here - tile.length_q - inputs.window.left,
    )
    key_0 = 0
    key_1 = 0
    document_key = 0
    query_offset = 0
    if HAS_DROPOUT:
        key_0, key_1, document_key, query_offset = load_key(
            dropout.seed, dropout.document_ids, dropout.query_offsets, dropout.document
        )
    random = SeedWords(key_0, key_1, document_key, query_offset, dropout.first_head)
    dk = gl.zeros([HALF, BLOCK_D], gl.float32, o_layout)
    dv = gl.zeros([HALF, BLOCK_D], gl.float32, o_layout)
    zero_s = gl.zeros([HALF, BLOCK_M], gl.float32, s_layout)
    zero_q = gl.zeros([DQ_ROWS, DQ_COLUMNS], gl.float32, dq_layout)
    steps = GROUP * (high - tile.low)
    mbarrier.wait(shared.kv_ready, 0)
    if steps > 0:
        opaque_false = high < 0
        query = (high - 1) * BLOCK_M
        mbarrier.wait(shared.q_ready.index(0), 0)
        s = _start_product(shared.k, shared.q, 0, zero_s, opaque_false, HALF_INDEX)
        lse = shared.lse.index(0).load(column_s)
        bits = _draw_bits(random, tile.head_kv * GROUP, query, first_key, s_layout, HAS_DROPOUT)
        s = warpgroup_mma_wait(0, deps=[s])
        p, weights = _weights(
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
            opaque_false = high - 1 - step // GROUP < 0
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
            s = _start_product(shared.k, shared.q, following, zero_s, opaque_false, HALF_INDEX)
            barrier_wait(DS_READY + 2 * (step & 1) + 1 - HALF_INDEX, CONSUMERS, 4)
            dq = start_dq(ds_bufs, shared.k, step & 1, zero_q, opaque_false, HALF_INDEX, TRANSPOSED)
            if HAS_DROPOUT:
                # dq is stored before the random bits are drawn: both need the same registers.
                dk, s, dq = warpgroup_mma_wait(0, deps=[dk, s, dq])
                _emit_dq(dq, dq_out, step, tile.length_q, high - 1, TILE, HALF_INDEX, TRANSPOSED)
            else:
                dk, s = warpgroup_mma_wait(1, deps=[dk, s])
            lse = shared.lse.index(following).load(column_s)
            release_stage(BLOCK_EMPTY, stage, PRODUCER_AND_CONSUMERS)
            query = (high - 1 - (step + 1) // GROUP) * BLOCK_M
            head = tile.head_kv * GROUP + (step + 1) % GROUP
            bits = _draw_bits(random, head, query, first_key, s_layout, HAS_DROPOUT)
            p, weights = _weights(
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
                _emit_dq(dq, dq_out, step, tile.length_q, high - 1, TILE, HALF_INDEX, TRANSPOSED)
        step = steps - 1
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
        _emit_dq(dq, dq_out, step, tile.length_q, high - 1, TILE, HALF_INDEX, TRANSPOSED)
    if not TILE.dq_from_registers:
        drain_partial_dq(steps, HALF_INDEX)
    keys = OutputKeys(first_key, tile.length_k, tile.begin_k, tile.head_kv)
    offsets, inside = key_offsets(
        keys, results.token, results.head, TILE.head_dim, o_layout, HALF, BLOCK_D
    )
    gl.store(results.dv + offsets, (dv * factors.keep_scale).to(dtype), mask=inside)
    dk = dk * (factors.scale * factors.keep_scale)
    gl.store(results.dk + offsets, dk.to(dtype), mask=inside)
