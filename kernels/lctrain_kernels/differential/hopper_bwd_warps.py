"""The producer warp and the dQ warp of the Hopper backward of differential attention."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from lctrain_kernels.gluon.backward_pipeline import (
    acquire_partial_dq,
    load_rows,
    next_block,
    release_partial_dq,
)
from lctrain_kernels.gluon.barriers import (
    DOUT_EMPTY,
    PRODUCER_AND_CONSUMERS,
    Q_EMPTY,
    acquire_stage,
    drain_stages,
)
from lctrain_kernels.gluon.compat import copy_arrive, copy_async, reinterpret, tma_add, tma_load
from lctrain_kernels.gluon.coordinates import RAGGED, Rows
from lctrain_kernels.gluon.forward_pipeline import load_block

DQ_COLUMNS = gl.constexpr(64)  # columns of dq that a warpgroup stores at once


@gluon.jit
def load(
    q_descs,
    do_desc,
    k_descs,
    v_desc,
    shared,
    stats,
    stats_size,
    tile,
    TILE: gl.constexpr,
):
    """Runs the producer warp: loads the tile's keys and values, then blocks of queries and dout.

    The lse and delta of a block are loaded with it, for both branches. `stats_size` is H * T, the
    distance of two numbers of a query in stats [4, H, T].
    """
    GROUP: gl.constexpr = TILE.group
    BLOCK_M: gl.constexpr = TILE.block_m
    BLOCK_D: gl.constexpr = TILE.block_d
    STAGES: gl.constexpr = TILE.stages
    NUM_K: gl.constexpr = TILE.num_k
    dtype: gl.constexpr = v_desc.dtype
    length_q = tile.length_q
    mbarrier.expect(shared.kv_ready, TILE.block_n * (NUM_K * BLOCK_D + TILE.block_dv) * 2)
    keys = Rows(tile.begin_k + tile.length_k, RAGGED - tile.length_k + tile.first, tile.head_kv)
    for branch in gl.static_range(NUM_K):
        load_rows(k_descs[branch], shared.k, 2 * branch, shared.kv_ready, keys)
    load_rows(v_desc, shared.v, 0, shared.kv_ready, keys)
    lanes: gl.constexpr = gl.BlockedLayout([BLOCK_M // 32], [32], [1], [0])
    local = gl.arange(0, BLOCK_M, lanes)
    head = tile.head_kv * GROUP
    block = tile.high - 1
    steps = GROUP * (tile.high - tile.low)
    for step in range(steps):
        stage = step % STAGES
        query = block * BLOCK_M + local
        vector = stats.lse + head.to(gl.int64) * stats.total_q + tile.begin_q + query
        row = RAGGED - length_q + block * BLOCK_M
        acquire_stage(Q_EMPTY, step, STAGES, PRODUCER_AND_CONSUMERS)
        for branch in gl.static_range(2):
            copy_async(
                shared.lse.index(2 * stage + branch),
                vector + branch * stats_size,
                mask=query < length_q,
            )
        copy_arrive(shared.q_ready.index(stage))
        mbarrier.expect(shared.q_ready.index(stage), 2 * BLOCK_M * BLOCK_D * 2)
        for branch in gl.static_range(2):
            tma_load(
                q_descs[branch],
                [RAGGED, tile.begin_q + length_q, row, head, 0],
                shared.q_ready.index(stage),
                reinterpret(
                    shared.q.index(2 * stage + branch),
                    dtype,
                    [1, 1, BLOCK_M, 1, BLOCK_D],
                    q_descs[0].layout,
                ),
            )
        acquire_stage(DOUT_EMPTY, step, STAGES, PRODUCER_AND_CONSUMERS)
        for branch in gl.static_range(2):
            copy_async(
                shared.delta.index(2 * stage + branch),
                vector + (2 + branch) * stats_size,
                mask=query < length_q,
            )
        copy_arrive(shared.dout_ready.index(stage))
        queries = Rows(tile.begin_q + length_q, row, head)
        load_block(do_desc, shared.dout.index(stage), shared.dout_ready.index(stage), queries)
        head, block = next_block(head, block, tile.head_kv, GROUP)
    drain_stages(Q_EMPTY, steps, STAGES, PRODUCER_AND_CONSUMERS)
    drain_stages(DOUT_EMPTY, steps, STAGES, PRODUCER_AND_CONSUMERS)


@gluon.jit
def add_partial_dq(dq_descs, dq_bufs, tile, TILE: gl.constexpr):
    """Runs the dQ warp, which adds partial dq1 and dq2 to float32 buffers by TMA.

    A buffer in shared memory holds 64 columns, so wider heads take two rounds per step.
    """
    GROUP: gl.constexpr = TILE.group
    ROUNDS: gl.constexpr = TILE.block_d // DQ_COLUMNS
    head = tile.head_kv * GROUP
    block = tile.high - 1
    for _ in range(GROUP * (tile.high - tile.low)):
        row = RAGGED - tile.length_q + block * TILE.block_m
        for part in gl.static_range(ROUNDS):
            for branch in gl.static_range(2):
                tma_add(
                    dq_descs[branch],
                    [RAGGED, tile.begin_q + tile.length_q, row, head, part * DQ_COLUMNS],
                    acquire_partial_dq(dq_bufs, branch, dq_descs[0]),
                )
            release_partial_dq()
        head, block = next_block(head, block, tile.head_kv, GROUP)
