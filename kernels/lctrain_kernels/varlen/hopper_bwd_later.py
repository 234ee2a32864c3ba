"""Steps of the Hopper backward of varlen attention in which partial dq comes a step later.

The two warpgroups never wait for each other's dS of the same step, so one may be a step ahead, and
its products run while the other computes weights and dS.
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
    keys_weights,
    next_visit,
    start_dq,
)
from lctrain_kernels.gluon.barriers import (
    BLOCK_EMPTY,
    CONSUMERS,
    DS_LATER_0,
    DS_LATER_1,
    PRODUCER_AND_CONSUMERS,
    VARLEN_BWD_LATER_STAGES,
    barrier_arrive,
    barrier_wait,
    release_stage,
)
from lctrain_kernels.gluon.primitives import computed, rounded
from lctrain_kernels.gluon.structures import Visit
from lctrain_kernels.tile.logits import LOG2_E
from lctrain_kernels.varlen.hopper_bwd_dq import add_dq_of_step
from lctrain_kernels.varlen.hopper_bwd_products import gradient_of_logits, start_product

_LOG2_E = gl.constexpr(LOG2_E)


@gluon.jit
def later_steps(
    inputs,
    bounds,
    dk,
    dv,
    TILE: gl.constexpr,
    FLAGS: gl.constexpr,
    s_layout: gl.constexpr,
    o_layout: gl.constexpr,
    dq_layout: gl.constexpr,
    HALF_INDEX: gl.constexpr,
):
    """Runs all steps of a consumer warpgroup; see plain_steps.

    dS has four pairs of buffers. A warpgroup stores dS of a step when it has read the other's dS of
    two steps before. At that time the other has computed dq of all but the last three steps.

    The order of the steps is that of the form with a dQ warp, so dk and dv have the same bits. The
    arguments and results are those of plain_steps.
    """
    shared = inputs.shared
    ds_bufs = inputs.ds
    tile = inputs.tile
    GROUP: gl.constexpr = TILE.group
    BLOCK_M: gl.constexpr = TILE.block_m
    STAGES: gl.constexpr = TILE.stages
    COLUMNS: gl.constexpr = dq_layout.instr_shape[1]
    COLUMN: gl.constexpr = HALF_INDEX * COLUMNS
    OURS: gl.constexpr = DS_LATER_0 if HALF_INDEX == 0 else DS_LATER_1
    THEIRS: gl.constexpr = DS_LATER_1 if HALF_INDEX == 0 else DS_LATER_0
    dtype: gl.constexpr = shared.k.dtype
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    zero_s = gl.zeros([TILE.block_n // 2, BLOCK_M], gl.float32, s_layout)
    zero_q = gl.zeros([BLOCK_M, COLUMNS], gl.float32, dq_layout)
    multiplier = inputs.factors.scale * _LOG2_E
    gl.static_assert(STAGES <= VARLEN_BWD_LATER_STAGES, "named barriers overlap")
    visit = first_visit(tile, False)
    # Values of its own, which the loop can carry: it does not carry a second name of visit's.
    last = Visit(gl.maximum(visit.member, 0), gl.maximum(visit.block, 0))
    steps = GROUP * (tile.high - tile.low)
    for step in range(steps):
        stage = step % STAGES
        phase = (step // STAGES) & 1
        opaque_false = visit.block < 0
        mbarrier.wait(shared.q_ready.index(stage), phase)
        s = start_product(shared.k, shared.q, stage, zero_s, opaque_false, HALF_INDEX)
        mbarrier.wait(shared.dout_ready.index(stage), phase)
        dp = start_product(shared.v, shared.dout, stage, zero_s, opaque_false, HALF_INDEX)
        s = warpgroup_mma_wait(1, deps=[s])
        lse = shared.lse.index(stage).load(gl.SliceLayout(0, s_layout))
        query = visit.block * BLOCK_M
        p = keys_weights(s, lse, query, bounds, multiplier, BLOCK_M, s_layout, FLAGS)
        p = computed(p, opaque_false)
        dp = warpgroup_mma_wait(0, deps=[dp])
        ds = gradient_of_logits(dp, p, shared, stage, dtype, s_layout, False)
        ds_bufs.index((step & 3) * 2 + HALF_INDEX).store(ds)
        seen = gl.convert_layout(rounded(p, dtype), p_layout)
        dv = warpgroup_mma(seen, shared.dout.index(stage), dv, is_async=True)
        fence_async_shared()
        barrier_arrive(OURS + (step & 3), CONSUMERS, 4)
        ds_operand = gl.convert_layout(ds, p_layout)
        # Before the first step nothing is awaited, and its product is not added.
        before = (step + 3) & 3
        barrier_wait(THEIRS + before, CONSUMERS, 4, gl.where(step > 0, 1, 0))
        dq = start_dq(ds_bufs, shared.k, before, zero_q, opaque_false, HALF_INDEX, False)
        dv = warpgroup_mma_wait(1, deps=[dv])
        dk = warpgroup_mma(ds_operand, shared.q.index(stage), dk, is_async=True)
        dq = warpgroup_mma_wait(1, deps=[dq])
        add_dq_of_step(dq, inputs.dq_out, last, tile, step > 0, 0, COLUMN, TILE)
        dk = warpgroup_mma_wait(0, deps=[dk])
        release_stage(BLOCK_EMPTY, stage, PRODUCER_AND_CONSUMERS)
        last = visit
        visit = next_visit(visit, tile, GROUP, False)
    before = (steps + 3) & 3
    barrier_wait(THEIRS + before, CONSUMERS, 4, gl.where(steps > 0, 1, 0))
    dq = start_dq(ds_bufs, shared.k, before, zero_q, last.block < 0, HALF_INDEX, False)
    dq = warpgroup_mma_wait(0, deps=[dq])
    add_dq_of_step(dq, inputs.dq_out, last, tile, steps > 0, 0, COLUMN, TILE)
    return dk, dv
