"""What a warpgroup does in the backward of varlen attention for Hopper."""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from lctrain_kernels.gluon.signals import (
    BLOCK_EMPTY,
    BOTH,
    DS_READY,
    LOADER_AND_BOTH,
    await_signal,
    give_place,
    signal,
)
from lctrain_kernels.gluon.step import draw_words, finished, held, kept, load_key, rounded, tanh
from lctrain_kernels.gluon.structures import KeyBounds, OutputKeys, SeedWords
from lctrain_kernels.gluon.tile_keys import (
    keys_weights,
    multiply_dq,
    place_keys,
    put_dq,
    settle_dq,
)
from lctrain_kernels.tile.logits import LOG2_E
from lctrain_kernels.varlen.hopper_bwd_dq import reduce_dq

_LOG2_E = gl.constexpr(LOG2_E)


@gluon.jit
def _start(of_keys, of_queries, place, zero, never, HALF_INDEX: gl.constexpr):
    """Starts S (k and q) or dP (v and dout) of the block of queries in `place`."""
    return warpgroup_mma(
        held(of_keys, HALF_INDEX, never),
        of_queries.index(place).permute((1, 0)),
        zero,
        use_acc=False,
        is_async=True,
    )


@gluon.jit
def _draw(random, head, query, first_key, s_layout: gl.constexpr, HAS_DROPOUT: gl.constexpr):
    """Random bits of a block of weights. They need no scores, so they are drawn meanwhile."""
    words = 0
    if HAS_DROPOUT:
        words = draw_words(
            random.key_0,
            random.key_1,
            random.document,
            head.to(gl.uint32),
            query,
            gl.arange(0, 64, gl.SliceLayout(0, s_layout))[None, :],
            first_key,
            gl.arange(0, 64, gl.SliceLayout(1, s_layout))[:, None],
        )
    return words


@gluon.jit
def _weigh(
    s,
    words,
    lse,
    query,
    bounds,
    threshold,
    factors,
    never,
    dtype: gl.constexpr,
    s_layout: gl.constexpr,
    FLAGS: gl.constexpr,
):
    """(p, p times softcap's slope), both [keys, queries] in half precision.

    Whether a weight is kept is its sign, in both. Without softcap they are the same.
    """
    multiplier = factors.scale * _LOG2_E
    if FLAGS.has_softcap:
        bounded = tanh(s * (factors.scale / factors.softcap))
        s = bounded * (factors.softcap * _LOG2_E)
        multiplier = 1.0
    p = keys_weights(s, lse, query, bounds, multiplier, 64, s_layout, FLAGS)
    if FLAGS.has_dropout:
        local_key = gl.arange(0, 64, gl.SliceLayout(1, s_layout))
        p = gl.where(kept(words, local_key[:, None], threshold), p, -p)
    if FLAGS.has_softcap:
        weights = rounded(p * (1.0 - bounded * bounded), dtype)
        return finished(rounded(p, dtype), never), weights
    else:
        p = finished(rounded(p, dtype), never)
        return p, p


@gluon.jit
def _kept_weights(p, HAS_DROPOUT: gl.constexpr):
    """p without the weights that are dropped, which _weigh tells by their sign."""
    if HAS_DROPOUT:
        p = gl.where(p < 0.0, gl.zeros_like(p), p)
    return p


@gluon.jit
def _leave(
    dq,
    dq_out,
    step,
    length_q,
    last,
    TILE: gl.constexpr,
    HALF_INDEX: gl.constexpr,
    TURNED: gl.constexpr,
):
    """Sends a step's columns of dq on their way.

    Args:
        dq: Of the step, half of the columns.
        dq_out: Buffers of the dQ warp, or DqSlabs with TILE.dq_from_registers.
        step: Number of the step.
        length_q: Queries of the document.
        last: Last block of queries.
        TILE: BackwardShape.
        HALF_INDEX: Half of the columns.
        TURNED: As in multiply_dq.
    """
    if TILE.dq_from_registers:
        back = step // TILE.group
        slabs = step % TILE.group * dq_out.per_head - back * (TILE.block_m // 16)
        rows = length_q - (last - back) * TILE.block_m
        slab_ptr = dq_out.pointer + slabs.to(gl.int64) * (16 * TILE.head_dim)
        reduce_dq(dq, slab_ptr, rows, HALF_INDEX, TILE.head_dim)
    else:
        put_dq(dq, dq_out, step, HALF_INDEX, TURNED)


@gluon.jit
def _spend(
    shared,
    ds_bufs,
    step,
    p,
    weights,
    zero,
    dk,
    dv,
    never,
    TILE: gl.constexpr,
    FLAGS: gl.constexpr,
    s_layout: gl.constexpr,
    o_layout: gl.constexpr,
    HALF_INDEX: gl.constexpr,
):
    """Takes a step's weights: dv, and dS, which it shows to the other warpgroup. Starts dk.

    Returns:
        dk, which is on its way, and dv.
    """
    STAGES: gl.constexpr = TILE.stages
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    place = step % STAGES
    mbarrier.wait(shared.dout_ready.index(place), (step // STAGES) & 1)
    dp = _start(shared.v, shared.dout, place, zero, never, HALF_INDEX)
    seen = gl.convert_layout(_kept_weights(p, FLAGS.has_dropout), p_layout)
    dv = warpgroup_mma(seen, shared.dout.index(place), dv, is_async=True)
    dp = warpgroup_mma_wait(1, deps=[dp])
    delta = shared.delta.index(place).load(gl.SliceLayout(0, s_layout))
    weights = weights.to(gl.float32)
    if FLAGS.has_dropout:
        dp = gl.where(weights > 0.0, dp, 0.0)
        weights = gl.abs(weights)
    ds = (weights * (dp - delta[None, :])).to(shared.k.dtype)
    ds_operand = gl.convert_layout(ds, p_layout)
    # Two buffers: what is overwritten now, the other warpgroup read before it showed its last dS.
    ds_bufs.index((step & 1) * 2 + HALF_INDEX).store(ds)
    fence_async_shared()
    signal(DS_READY + 2 * (step & 1) + HALF_INDEX, BOTH, 4)
    dv = warpgroup_mma_wait(0, deps=[dv])
    return warpgroup_mma(ds_operand, shared.q.index(place), dk, is_async=True), dv


class ComputeInputs(NamedTuple):
    """What a consumer warpgroup of the backward works on.

    Attributes:
        shared: BackwardBuffers.
        dq_out: Two float32 buffers of partial dq, or DqSlabs.
        ds: dS of both warpgroups, [4, 64, block_m].
        results: KeyGradients.
        tile: KeyTile.
        window: Bounds.
        dropout: DropoutInputs.
        factors: Factors.
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
    """One warpgroup: half of the tile's keys, and half of the columns of dq.

    The next step begins before a step ends: while dq is multiplied, the next weights are found. The
    other warpgroup may be a step ahead or behind, and its products run while this one has none.
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
    TURNED: gl.constexpr = COLUMNS == 64 and not TILE.dq_from_registers
    DQ_ROWS: gl.constexpr = COLUMNS if TURNED else BLOCK_M
    DQ_COLUMNS: gl.constexpr = BLOCK_M if TURNED else COLUMNS
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
    if HAS_DROPOUT:
        key_0, key_1, document_key = load_key(dropout.seed, dropout.document_ids, dropout.document)
    random = SeedWords(key_0, key_1, document_key)
    dk = gl.zeros([HALF, BLOCK_D], gl.float32, o_layout)
    dv = gl.zeros([HALF, BLOCK_D], gl.float32, o_layout)
    zero_s = gl.zeros([HALF, BLOCK_M], gl.float32, s_layout)
    zero_q = gl.zeros([DQ_ROWS, DQ_COLUMNS], gl.float32, dq_layout)
    steps = GROUP * (high - tile.low)
    mbarrier.wait(shared.kv_ready, 0)
    if steps > 0:
        never = high < 0
        query = (high - 1) * BLOCK_M
        mbarrier.wait(shared.q_ready.index(0), 0)
        s = _start(shared.k, shared.q, 0, zero_s, never, HALF_INDEX)
        lse = shared.lse.index(0).load(column_s)
        words = _draw(random, tile.head_kv * GROUP, query, first_key, s_layout, HAS_DROPOUT)
        s = warpgroup_mma_wait(0, deps=[s])
        p, weights = _weigh(
            s, words, lse, query, bounds, dropout.threshold, factors, never, dtype, s_layout, FLAGS
        )
        for step in range(steps - 1):
            place = step % STAGES
            never = high - 1 - step // GROUP < 0
            dk, dv = _spend(
                *(shared, ds_bufs, step, p, weights, zero_s, dk, dv, never),
                TILE,
                FLAGS,
                s_layout,
                o_layout,
                HALF_INDEX,
            )
            following = (step + 1) % STAGES
            mbarrier.wait(shared.q_ready.index(following), ((step + 1) // STAGES) & 1)
            s = _start(shared.k, shared.q, following, zero_s, never, HALF_INDEX)
            await_signal(DS_READY + 2 * (step & 1) + 1 - HALF_INDEX, BOTH, 4)
            dq = multiply_dq(ds_bufs, shared.k, step & 1, zero_q, never, HALF_INDEX, TURNED)
            if HAS_DROPOUT:
                # Random bits need the registers of dq, so it leaves at once.
                dk, s, dq = warpgroup_mma_wait(0, deps=[dk, s, dq])
                _leave(dq, dq_out, step, tile.length_q, high - 1, TILE, HALF_INDEX, TURNED)
            else:
                dk, s = warpgroup_mma_wait(1, deps=[dk, s])
            lse = shared.lse.index(following).load(column_s)
            give_place(BLOCK_EMPTY, place, LOADER_AND_BOTH)
            query = (high - 1 - (step + 1) // GROUP) * BLOCK_M
            head = tile.head_kv * GROUP + (step + 1) % GROUP
            words = _draw(random, head, query, first_key, s_layout, HAS_DROPOUT)
            p, weights = _weigh(
                s,
                words,
                lse,
                query,
                bounds,
                dropout.threshold,
                factors,
                never,
                dtype,
                s_layout,
                FLAGS,
            )
            if not HAS_DROPOUT:
                dq = warpgroup_mma_wait(0, deps=[dq])
                _leave(dq, dq_out, step, tile.length_q, high - 1, TILE, HALF_INDEX, TURNED)
        step = steps - 1
        dk, dv = _spend(
            *(shared, ds_bufs, step, p, weights, zero_s, dk, dv, never),
            TILE,
            FLAGS,
            s_layout,
            o_layout,
            HALF_INDEX,
        )
        await_signal(DS_READY + 2 * (step & 1) + 1 - HALF_INDEX, BOTH, 4)
        dq = multiply_dq(ds_bufs, shared.k, step & 1, zero_q, never, HALF_INDEX, TURNED)
        dk, dq = warpgroup_mma_wait(0, deps=[dk, dq])
        give_place(BLOCK_EMPTY, step % STAGES, LOADER_AND_BOTH)
        _leave(dq, dq_out, step, tile.length_q, high - 1, TILE, HALF_INDEX, TURNED)
    if not TILE.dq_from_registers:
        settle_dq(steps, HALF_INDEX)
    keys = OutputKeys(first_key, tile.length_k, tile.begin_k, tile.head_kv)
    offsets, inside = place_keys(
        keys, results.token, results.head, TILE.head_dim, o_layout, HALF, BLOCK_D
    )
    gl.store(results.dv + offsets, (dv * factors.keep_scale).to(dtype), mask=inside)
    dk = dk * (factors.scale * factors.keep_scale)
    gl.store(results.dk + offsets, dk.to(dtype), mask=inside)
