"""Backward of varlen attention for Hopper, in Gluon: one kernel computes dq, dk and dv.

A program computes dk and dv of one tile of keys. Its partial dq is added to a float32 buffer in
global memory, because programs of other tiles of keys add to the same queries.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from lctrain_kernels.gluon.backward_pipeline import (
    allocate_partial_dq,
    allocate_query_bars,
    first_visit,
    load_rows,
    next_visit,
    read_slot,
)
from lctrain_kernels.gluon.barriers import (
    BLOCK_EMPTY,
    PRODUCER_AND_CONSUMERS,
    VARLEN_BWD_STAGES,
    acquire_stage,
    drain_stages,
)
from lctrain_kernels.gluon.compat import copy_arrive, copy_async
from lctrain_kernels.gluon.coordinates import RAGGED, Bounds, Rows
from lctrain_kernels.gluon.forward_pipeline import load_block
from lctrain_kernels.gluon.primitives import load_window, query_blocks
from lctrain_kernels.gluon.structures import (
    BackwardBuffers,
    DqSlabs,
    DropoutInputs,
    Factors,
    KeyGradients,
    KeyTile,
    Semaphores,
    Statistics,
)
from lctrain_kernels.varlen.hopper_bwd_compute import ComputeInputs, compute
from lctrain_kernels.varlen.hopper_bwd_dq import add_partial_dq, first_slab, round_dq


@gluon.jit
def locate(pointers, window, TILE: gl.constexpr, FLAGS: gl.constexpr):
    """Returns the index of this program's document, and its tile of keys, a KeyTile.

    A slot of the schedule is a tile of 128 keys. With 64 keys, a slot has twice as many programs as
    key/value heads. An empty slot, or a program without a tile, gets no queries and no keys.

    Args:
        pointers: Tensors of the call, a BackwardPointers.
        window: Attention window of the call, a Bounds.
        TILE: Tile sizes and head counts of the backward kernel, a BackwardShape.
        FLAGS: Features beyond plain attention, a tile.structures.Flags.
    """
    PER_HEAD: gl.constexpr = 128 // TILE.block_n
    slot = read_slot(
        pointers.cu_seqlens_q,
        pointers.cu_seqlens_k,
        pointers.tiles,
        PER_HEAD * TILE.heads_kv,
        TILE.block_n,
    )
    empty = slot.document < 0
    if PER_HEAD > 1:  # the last slot of a document may have fewer tiles
        empty = empty | (slot.head_kv >= TILE.heads_kv)
    low, high = query_blocks(
        slot.first,
        TILE.block_n,
        slot.length_k - slot.length_q,
        slot.length_q,
        window.left,
        window.right,
        FLAGS.has_left,
        FLAGS.has_right,
        TILE.block_m,
    )
    high = gl.where(empty, low, high)
    length_k = gl.where(empty, 0, slot.length_k)
    tile = KeyTile(
        slot.head_kv,
        slot.begin_q,
        slot.length_q,
        slot.begin_k,
        length_k,
        slot.first,
        low,
        high,
    )
    return gl.maximum(slot.document, 0), tile


@gluon.jit
def load_tensors(
    q_desc,
    do_desc,
    k_desc,
    v_desc,
    shared,
    stats,
    tile,
    TILE: gl.constexpr,
):
    """Runs the producer warp: loads the tile's keys and values, then blocks of queries and dout.

    The lse and delta of a block are loaded with it. All query heads of the group are visited.

    Args:
        q_desc: TMA descriptor of q [T, H, D].
        do_desc: TMA descriptor of dout [T, H, D].
        k_desc: TMA descriptor of k [Tk, Hk, D].
        v_desc: TMA descriptor of v [Tk, Hk, D].
        shared: Shared memory of the kernel, a BackwardBuffers.
        stats: lse and delta in global memory, a Statistics.
        tile: The program's tile of keys, a KeyTile.
        TILE: Tile sizes and head counts of the backward kernel, a BackwardShape.
    """
    GROUP: gl.constexpr = TILE.group
    BLOCK_M: gl.constexpr = TILE.block_m
    STAGES: gl.constexpr = TILE.stages
    BY_HEAD: gl.constexpr = TILE.dq_from_registers and (TILE.block_d != 128 or TILE.head_dim <= 96)
    keys = Rows(tile.begin_k + tile.length_k, RAGGED - tile.length_k + tile.first, tile.head_kv)
    mbarrier.expect(shared.kv_ready, 2 * TILE.block_n * TILE.block_d * 2)
    load_rows(k_desc, shared.k, 0, shared.kv_ready, keys, TILE.block_n // 64)
    load_rows(v_desc, shared.v, 0, shared.kv_ready, keys, TILE.block_n // 64)
    lanes: gl.constexpr = gl.BlockedLayout([BLOCK_M // 32], [32], [1], [0])
    local = gl.arange(0, BLOCK_M, lanes)
    visit = first_visit(tile, BY_HEAD)
    steps = GROUP * (tile.high - tile.low)
    for step in range(steps):
        stage = step % STAGES
        head = tile.head_kv * GROUP + visit.member
        first_query = visit.block * BLOCK_M
        vector = head.to(gl.int64) * stats.total_q + tile.begin_q + first_query + local
        left_here = tile.length_q - first_query
        queries = Rows(tile.begin_q + tile.length_q, RAGGED - left_here, head)
        acquire_stage(BLOCK_EMPTY, step, STAGES, PRODUCER_AND_CONSUMERS)
        copy_async(shared.lse.index(stage), stats.lse + vector, mask=local < left_here)
        copy_arrive(shared.q_ready.index(stage))
        load_block(q_desc, shared.q.index(stage), shared.q_ready.index(stage), queries)
        copy_async(shared.delta.index(stage), stats.delta + vector, mask=local < left_here)
        copy_arrive(shared.dout_ready.index(stage))
        load_block(do_desc, shared.dout.index(stage), shared.dout_ready.index(stage), queries)
        visit = next_visit(visit, tile, GROUP, BY_HEAD)
    drain_stages(BLOCK_EMPTY, steps, STAGES, PRODUCER_AND_CONSUMERS)


class BackwardPointers(NamedTuple):
    """Pointers to the tensors that varlen_bwd_hopper_kernel accesses without TMA.

    The kernel's docstring gives the shapes of operands and results. Boundaries, tiles, document_ids
    and query_offsets are those of TiledPack; options are those of AttentionOptions.
    """

    lse: Any
    delta: Any
    dk: Any
    dv: Any
    dq_sum: Any
    dq: Any
    cu_seqlens_q: Any
    cu_seqlens_k: Any
    tiles: Any
    window: Any
    dropout_seed: Any
    document_ids: Any
    query_offsets: Any
    semaphores: Any


class BackwardStrides(NamedTuple):
    """Strides of tokens and heads of dk and dv, and of dq, in elements."""

    dk_token: Any
    dk_head: Any
    dq_token: Any
    dq_head: Any


@gluon.jit(
    do_not_specialize=[
        "per_head",
        "total_q",
        "window_left",
        "window_right",
        "threshold",
        "first_head",
    ]
)
def varlen_bwd_hopper_kernel(
    q_desc,
    do_desc,
    k_desc,
    v_desc,
    dq_desc,
    pointers: BackwardPointers,
    per_head,
    strides: BackwardStrides,
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
    """Computes dk and dv of a tile of keys, and adds its partial dq to a float32 buffer.

    A program processes one tile of keys of one key/value head, and all queries of the head's group
    that see it. Grid: (tiles * key/value heads,). TILE.block_m is 64.

    - lse [H, T] float32: base-2 log-sum-exp, +inf for a query that saw no key.
    - delta [H, T] float32: delta / keep_scale.

    With dq_desc, dq_sum is the float32 buffer [T, H, D] that dq_desc describes. The kernel also
    writes dq, in the same layout, except for queries that see no key. semaphores [H, per_head]
    int32 is zero at launch. Programs must start in order, because they wait for earlier ones.

    With TILE.dq_from_registers, dq_sum is zero at launch, and has the layout of first_slab with
    per_head slabs per head. dq_desc, dq and semaphores are then None.

    gluon/structures.py describes the arguments that are not named here.
    """
    BLOCK_M: gl.constexpr = TILE.block_m
    BLOCK_D: gl.constexpr = TILE.block_d
    STAGES: gl.constexpr = TILE.stages
    FROM_REGISTERS: gl.constexpr = TILE.dq_from_registers
    gl.static_assert(BLOCK_M == 64, "128 queries are varlen_bwd_persistent_hopper_kernel's")
    gl.static_assert(STAGES >= 2, "queries of the next step are awaited before a step's are read")
    gl.static_assert((dq_desc is None) == FROM_REGISTERS, "the dQ warp alone uses dq_desc")
    gl.static_assert(TILE.stages <= VARLEN_BWD_STAGES, "named barriers overlap")
    dtype: gl.constexpr = q_desc.dtype
    HALF: gl.constexpr = TILE.block_n // 2
    left, right = load_window(pointers.window, window_left, window_right)
    window = Bounds(left, right)
    document, tile = locate(pointers, window, TILE, FLAGS)

    vector_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    n_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF, BLOCK_D], dtype)
    m_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, BLOCK_D], dtype)
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF, BLOCK_M], dtype)
    k_bufs = gl.allocate_shared_memory(dtype, [2, HALF, BLOCK_D], n_layout)
    v_bufs = gl.allocate_shared_memory(dtype, [2, HALF, BLOCK_D], n_layout)
    q_bufs = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_D], m_layout)
    do_bufs = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_D], m_layout)
    PLAIN: gl.constexpr = not (FLAGS.has_dropout or FLAGS.has_softcap)
    LATER: gl.constexpr = FROM_REGISTERS and PLAIN and BLOCK_D == 128 and TILE.head_dim > 96
    ds_bufs = gl.allocate_shared_memory(dtype, [8 if LATER else 4, HALF, BLOCK_M], ds_layout)
    if FROM_REGISTERS:
        slab_ptr = first_slab(pointers.dq_sum, per_head, tile, document, TILE)
        dq_out = DqSlabs(slab_ptr, per_head)
    else:
        dq_out = allocate_partial_dq(BLOCK_M, BLOCK_D // 2)
    lse_bufs = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], vector_layout)
    delta_bufs = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], vector_layout)
    kv_ready = gl.allocate_shared_memory(gl.int64, [1], bar)
    q_ready, dout_ready = allocate_query_bars(STAGES)
    mbarrier.init(kv_ready, count=1)
    shared = BackwardBuffers(
        k_bufs, v_bufs, q_bufs, do_bufs, lse_bufs, delta_bufs, kv_ready, q_ready, dout_ready
    )
    results = KeyGradients(pointers.dk, pointers.dv, strides.dk_token, strides.dk_head)
    dropout = DropoutInputs(
        pointers.dropout_seed,
        pointers.document_ids,
        pointers.query_offsets,
        document,
        threshold,
        first_head,
    )
    factors = Factors(scale, softcap, keep_scale)
    stats = Statistics(pointers.lse, pointers.delta, total_q)
    semaphores = Semaphores(pointers.semaphores, per_head, document)
    inputs = ComputeInputs(shared, dq_out, ds_bufs, results, tile, window, dropout, factors)
    if FROM_REGISTERS:
        gl.warp_specialize(
            [
                (compute, (inputs, TILE, FLAGS, 0)),
                (compute, (inputs, TILE, FLAGS, 1)),
                (load_tensors, (q_desc, do_desc, k_desc, v_desc, shared, stats, tile, TILE)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [
                (compute, (inputs, TILE, FLAGS, 0)),
                (compute, (inputs, TILE, FLAGS, 1)),
                (load_tensors, (q_desc, do_desc, k_desc, v_desc, shared, stats, tile, TILE)),
                (add_partial_dq, (dq_desc, dq_out, semaphores, tile, window, TILE)),
            ],
            [4, 1, 1],
            [240, 24, 24],
        )
    if not FROM_REGISTERS:
        # The tile is computed again, so that the loops above hold none of its fields in registers.
        left, right = load_window(pointers.window, window_left, window_right)
        window = Bounds(left, right)
        document, tile = locate(pointers, window, TILE, FLAGS)
        round_dq(
            pointers.dq_sum,
            pointers.dq,
            strides.dq_token,
            strides.dq_head,
            Semaphores(pointers.semaphores, per_head, document),
            tile,
            window,
            scale * keep_scale,
            TILE,
            FLAGS,
        )
