"""Steps of the Hopper backward of varlen attention at head dims from 65 to 96, without dropout.

Tiles in shared memory have 128 columns. Products take the first 64 and the next 32 of them.
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
    first_visit,
    key_offsets,
    keys_weights,
    next_visit,
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
from lctrain_kernels.gluon.primitives import computed, rematerialised, rounded
from lctrain_kernels.tile.logits import LOG2_E
from lctrain_kernels.varlen.hopper_bwd_dq import add_dq_of_step
from lctrain_kernels.varlen.hopper_bwd_products import gradient_of_logits

_LOG2_E = gl.constexpr(LOG2_E)


@gluon.jit
def _start_product(of_keys, of_queries, stage, zero, opaque_false, HALF_INDEX: gl.constexpr):
    """Issues the asynchronous product S = k q^T or dP = v dout^T over 96 columns, without waiting.

    The product has two parts, of 64 and of 32 columns. The arguments are those of start_product.
    """
    keys = rematerialised(of_keys, HALF_INDEX, opaque_false)
    queries = of_queries.index(stage)
    token = warpgroup_mma(
        keys.slice(0, 64, dim=1),
        queries.slice(0, 64, dim=1).permute((1, 0)),
        zero,
        use_acc=False,
        is_async=True,
    )
    return warpgroup_mma(
        keys.slice(64, 32, dim=1),
        queries.slice(64, 32, dim=1).permute((1, 0)),
        token,
        is_async=True,
    )


@gluon.jit
def _start_dq(ds_bufs, k_bufs, buffer, zero_q, opaque_false, COLUMN: gl.constexpr):
    """Issues the asynchronous products of a warpgroup's columns of partial dq, without waiting.

    Args:
        ds_bufs: dS of two steps and both warpgroups, [4, keys, queries].
        k_bufs: Two halves of the tile's keys in shared memory, [2, keys, columns].
        buffer: Index of the step's pair of buffers of dS, 0 or 1.
        zero_q: Accumulator of zeros, [queries, columns of this warpgroup] float32.
        opaque_false: Condition that is always false, but that the compiler cannot evaluate.
        COLUMN: First column of this warpgroup.
    """
    token = zero_q
    for half in gl.static_range(2):
        ds = ds_bufs.index(buffer * 2 + half)
        k = rematerialised(k_bufs, half, opaque_false).slice(COLUMN, zero_q.shape[1], dim=1)
        token = warpgroup_mma(ds.permute((1, 0)), k, token, use_acc=half > 0, is_async=True)
    return token


@gluon.jit
def narrow_steps(
    inputs, bounds, keys, TILE: gl.constexpr, FLAGS: gl.constexpr, HALF_INDEX: gl.constexpr
):
    """Runs all steps of a consumer warpgroup, and stores its dk and dv.

    The order of a step is that of plain_steps. The first warpgroup computes columns 0 to 63 of
    partial dq, and the second columns 64 to 95.

    Args:
        inputs: Tensors, coordinates and factors, a ComputeInputs.
        bounds: Window and document end relative to the warpgroup's first key, a KeyBounds.
        keys: Coordinates of the warpgroup's keys, an OutputKeys.
        TILE: Tile sizes and head counts of the backward kernel, a BackwardShape.
        FLAGS: Features beyond plain attention, a tile.structures.Flags.
        HALF_INDEX: Index of this warpgroup, 0 or 1.
    """
    shared = inputs.shared
    ds_bufs = inputs.ds
    tile = inputs.tile
    results = inputs.results
    factors = inputs.factors
    GROUP: gl.constexpr = TILE.group
    BLOCK_M: gl.constexpr = TILE.block_m
    STAGES: gl.constexpr = TILE.stages
    HALF: gl.constexpr = TILE.block_n // 2
    COLUMN: gl.constexpr = 64 * HALF_INDEX
    dtype: gl.constexpr = shared.k.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    layout_0: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    layout_1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 32, 16])
    operand_0: gl.constexpr = gl.DotOperandLayout(0, layout_0, 2)
    operand_1: gl.constexpr = gl.DotOperandLayout(0, layout_1, 2)
    zero_s = gl.zeros([HALF, BLOCK_M], gl.float32, s_layout)
    if HALF_INDEX == 0:
        zero_q = gl.zeros([BLOCK_M, 64], gl.float32, layout_0)
    else:
        zero_q = gl.zeros([BLOCK_M, 32], gl.float32, layout_1)
    dk_0 = gl.zeros([HALF, 64], gl.float32, layout_0)
    dk_1 = gl.zeros([HALF, 32], gl.float32, layout_1)
    dv_0 = gl.zeros([HALF, 64], gl.float32, layout_0)
    dv_1 = gl.zeros([HALF, 32], gl.float32, layout_1)
    multiplier = factors.scale * _LOG2_E
    visit = first_visit(tile, True)
    for step in range(GROUP * (tile.high - tile.low)):
        stage = step % STAGES
        phase = (step // STAGES) & 1
        opaque_false = visit.block < 0
        mbarrier.wait(shared.q_ready.index(stage), phase)
        s = _start_product(shared.k, shared.q, stage, zero_s, opaque_false, HALF_INDEX)
        mbarrier.wait(shared.dout_ready.index(stage), phase)
        dp = _start_product(shared.v, shared.dout, stage, zero_s, opaque_false, HALF_INDEX)
        s = warpgroup_mma_wait(2, deps=[s])
        lse = shared.lse.index(stage).load(gl.SliceLayout(0, s_layout))
        query = visit.block * BLOCK_M
        p = keys_weights(s, lse, query, bounds, multiplier, BLOCK_M, s_layout, FLAGS)
        p = computed(p, opaque_false)
        dp = warpgroup_mma_wait(0, deps=[dp])
        ds = gradient_of_logits(dp, p, shared, stage, dtype, s_layout, False)
        # dS has two buffers. The other warpgroup read this one before it stored its last dS.
        ds_bufs.index((step & 1) * 2 + HALF_INDEX).store(ds)
        p = rounded(p, dtype)
        dout = shared.dout.index(stage)
        seen_0 = gl.convert_layout(p, operand_0)
        seen_1 = gl.convert_layout(p, operand_1)
        dv_0 = warpgroup_mma(seen_0, dout.slice(0, 64, dim=1), dv_0, is_async=True)
        dv_1 = warpgroup_mma(seen_1, dout.slice(64, 32, dim=1), dv_1, is_async=True)
        fence_async_shared()
        barrier_arrive(DS_READY + 2 * (step & 1) + HALF_INDEX, CONSUMERS, 4)
        ds_0 = gl.convert_layout(ds, operand_0)
        ds_1 = gl.convert_layout(ds, operand_1)
        barrier_wait(DS_READY + 2 * (step & 1) + 1 - HALF_INDEX, CONSUMERS, 4)
        dq = _start_dq(ds_bufs, shared.k, step & 1, zero_q, opaque_false, COLUMN)
        dv_0, dv_1 = warpgroup_mma_wait(2, deps=[dv_0, dv_1])
        q = shared.q.index(stage)
        dk_0 = warpgroup_mma(ds_0, q.slice(0, 64, dim=1), dk_0, is_async=True)
        dk_1 = warpgroup_mma(ds_1, q.slice(64, 32, dim=1), dk_1, is_async=True)
        dq = warpgroup_mma_wait(2, deps=[dq])
        add_dq_of_step(dq, inputs.dq_out, visit, tile, True, 0, COLUMN, TILE)
        dk_0, dk_1 = warpgroup_mma_wait(0, deps=[dk_0, dk_1])
        release_stage(BLOCK_EMPTY, stage, PRODUCER_AND_CONSUMERS)
        visit = next_visit(visit, tile, GROUP, True)
    scale_k = factors.scale * factors.keep_scale
    at_0, inside_0 = key_offsets(keys, results.token, results.head, 64, layout_0, HALF, 64)
    at_1, inside_1 = key_offsets(
        keys, results.token, results.head, TILE.head_dim - 64, layout_1, HALF, 32
    )
    gl.store(results.dv + at_0, (dv_0 * factors.keep_scale).to(dtype), mask=inside_0)
    gl.store(results.dv + at_1 + 64, (dv_1 * factors.keep_scale).to(dtype), mask=inside_1)
    gl.store(results.dk + at_0, (dk_0 * scale_k).to(dtype), mask=inside_0)
    gl.store(results.dk + at_1 + 64, (dk_1 * scale_k).to(dtype), mask=inside_1)
