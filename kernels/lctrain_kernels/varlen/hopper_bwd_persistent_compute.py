"""The consumer warpgroups of the persistent Hopper backward of varlen attention."""

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
    first_visit,
    key_offsets,
    keys_weights,
    next_visit,
)
from lctrain_kernels.gluon.barriers import (
    BLOCK_EMPTY,
    CONSUMERS,
    DS_APART_0,
    DS_APART_1,
    PRODUCER_AND_CONSUMERS,
    barrier_arrive,
    barrier_wait,
    release_stage,
)
from lctrain_kernels.gluon.coordinates import KeyBounds, OutputKeys
from lctrain_kernels.gluon.key_tile_scheduler import read_key_tile
from lctrain_kernels.gluon.primitives import computed, load_scalar, rematerialised, rounded
from lctrain_kernels.gluon.structures import DqSlabs, Visit
from lctrain_kernels.tile.logits import LOG2_E
from lctrain_kernels.varlen.hopper_bwd_dq import add_dq_of_step, first_slab
from lctrain_kernels.varlen.hopper_bwd_products import gradient_of_logits

_LOG2_E = gl.constexpr(LOG2_E)
KV_STAGES = gl.constexpr(2)  # tiles of keys and values in shared memory
DS_STAGES = gl.constexpr(3)  # steps of which dS is in shared memory


class PersistentBuffers(NamedTuple):
    """Shared memory of the kernel.

    Attributes:
        k: Two halves of the keys of two tiles, [4, 64, columns].
        v: Two halves of the values of two tiles, [4, 64, columns].
        q: Queries, [stages, block_m, columns].
        dout: Gradients of out, [stages, block_m, columns].
        ds: dS of three steps of each warpgroup, [6, 64, block_m].
        lse: Base-2 log-sum-exp of the queries, [stages, block_m].
        delta: Term that dS subtracts per query, [stages, block_m].
        tiles: Tile that the scheduler warp has written, [KEY_TILE_FIELDS, 1] int32.
        tile_bars: mbarriers of that tile, a Pipeline of one stage.
        kv_bars: mbarriers of keys and values, a Pipeline of two stages.
        q_ready: mbarriers of queries.
        dout_ready: mbarriers of dout.
    """

    k: Any
    v: Any
    q: Any
    dout: Any
    ds: Any
    lse: Any
    delta: Any
    tiles: Any
    tile_bars: Any
    kv_bars: Any
    q_ready: Any
    dout_ready: Any


@gluon.jit
def _visit_after(visit, tile, GROUP: gl.constexpr):
    """Returns the Visit of the following step: next_visit, in which one head needs no counter."""
    if GROUP == 1:
        return Visit(0, visit.block + 1)
    else:
        return next_visit(visit, tile, GROUP, True)


@gluon.jit
def _visit_before(visit, tile, GROUP: gl.constexpr):
    """Returns the Visit of the step before, which is not carried because registers are short."""
    if GROUP == 1:
        return Visit(0, visit.block - 1)
    else:
        first = visit.block == tile.low
        block = gl.where(first, tile.high, visit.block) - 1
        return Visit(gl.where(first, visit.member - 1, visit.member), block)


@gluon.jit
def _start_product(of_keys, of_queries, stage, zero, opaque_false, half):
    """Issues S = k q^T or dP = v dout^T, [keys, queries]; see start_product.

    Args:
        of_keys: Halves of the keys or values of two tiles in shared memory, [4, keys, columns].
        of_queries: Queries or dout in shared memory, [stages, queries, columns].
        stage: Pipeline stage of the block of queries.
        zero: Accumulator of zeros, [keys, queries] float32.
        opaque_false: Condition that is always false, but that the compiler cannot evaluate.
        half: Index of the tile's half in of_keys.
    """
    return warpgroup_mma(
        rematerialised(of_keys, half, opaque_false),
        of_queries.index(stage).permute((1, 0)),
        zero,
        use_acc=False,
        is_async=True,
    )


@gluon.jit
def _start_dq(shared, slot, half, zero, opaque_false, HALF_INDEX: gl.constexpr):
    """Issues partial dq of 64 queries from all keys of the tile, without waiting.

    Args:
        shared: Shared memory of the kernel, a PersistentBuffers.
        slot: Stage of dS.
        half: Index of the tile's first half in shared.k.
        zero: Accumulator of zeros, [64, columns] float32.
        opaque_false: Condition that is always false, but that the compiler cannot evaluate.
        HALF_INDEX: Which half of the block's queries, 0 or 1.
    """
    token = zero
    for part in gl.static_range(2):
        ds = shared.ds.index(part * DS_STAGES + slot).slice(HALF_INDEX * 64, 64, dim=1)
        k = rematerialised(shared.k, half + part, opaque_false)
        token = warpgroup_mma(ds.permute((1, 0)), k, token, use_acc=part > 0, is_async=True)
    return token


class PersistentInputs(NamedTuple):
    """Inputs of a consumer warpgroup.

    Attributes:
        shared: Shared memory of the kernel, a PersistentBuffers.
        pointers: Tensors of the call, a BackwardPointers.
        strides: Strides of dk and dv, a BackwardStrides.
        window: Attention window of the call, a Bounds.
        scale: softmax_scale.
        per_head: Number of slabs per head of the float32 dq.
    """

    shared: Any
    pointers: Any
    strides: Any
    window: Any
    scale: Any
    per_head: Any


@gluon.jit
def consume_key_tiles(inputs, TILE: gl.constexpr, FLAGS: gl.constexpr, HALF_INDEX: gl.constexpr):
    """Runs a consumer warpgroup, which computes dk and dv of half of each tile's keys.

    A step is that of plain_steps, but the second warpgroup is about half a step behind the first:
    it starts a step when the first has stored dS of the step. So the weights of one warpgroup are
    computed while the other's products of dv, dq and dk run. The first warpgroup
    computes its half of partial dq one step later, when the second has stored dS.

    dS has three stages. A warpgroup stores dS of a step when the other has computed dq of the step
    three before: it has waited for a signal that the other gave after that.

    Args:
        inputs: Tensors and scalars of the call, a PersistentInputs.
        TILE: Tile sizes and head counts of the backward kernel, a BackwardShape.
        FLAGS: Features beyond plain attention, a tile.structures.Flags.
        HALF_INDEX: Index of this warpgroup, 0 or 1.
    """
    shared = inputs.shared
    pointers = inputs.pointers
    strides = inputs.strides
    window = inputs.window
    scale = inputs.scale
    GROUP: gl.constexpr = TILE.group
    BLOCK_M: gl.constexpr = TILE.block_m
    BLOCK_D: gl.constexpr = TILE.block_d
    STAGES: gl.constexpr = TILE.stages
    FIRST: gl.constexpr = HALF_INDEX == 0
    OURS: gl.constexpr = DS_APART_0 if FIRST else DS_APART_1
    dtype: gl.constexpr = shared.k.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    zero_s = gl.zeros([64, BLOCK_M], gl.float32, s_layout)
    zero_q = gl.zeros([64, BLOCK_D], gl.float32, o_layout)
    multiplier = scale * _LOG2_E
    index = 0
    done = 0  # steps of all tiles before
    slot = 0
    mbarrier.wait(shared.tile_bars.ready, 0)
    document = load_scalar(shared.tiles.index(0), 4)
    while document >= 0:
        tile = read_key_tile(shared.tiles, 4)
        mbarrier.arrive(shared.tile_bars.empty, count=1)
        kv_stage = index % KV_STAGES
        half = kv_stage * 2
        first_key = tile.first + HALF_INDEX * 64
        keys_here = tile.length_k - first_key
        bounds = KeyBounds(
            keys_here,
            keys_here - tile.length_q + window.right,
            keys_here - tile.length_q - window.left,
        )
        keys = OutputKeys(first_key, tile.length_k, tile.begin_k, tile.head_kv)
        slabs = DqSlabs(
            first_slab(pointers.dq_sum, inputs.per_head, tile, document, TILE), inputs.per_head
        )
        dk = gl.zeros([64, BLOCK_D], gl.float32, o_layout)
        dv = gl.zeros([64, BLOCK_D], gl.float32, o_layout)
        mbarrier.wait(shared.kv_bars.ready.index(kv_stage), (index // KV_STAGES) & 1)
        begin = done
        end = done + GROUP * (tile.high - tile.low)
        visit = first_visit(tile, True)
        for step in range(begin, end):
            stage = step % STAGES
            phase = (step // STAGES) & 1
            opaque_false = visit.block < 0
            if not FIRST:
                barrier_wait(DS_APART_0 + slot, CONSUMERS, 4)
            mbarrier.wait(shared.q_ready.index(stage), phase)
            s = _start_product(shared.k, shared.q, stage, zero_s, opaque_false, half + HALF_INDEX)
            mbarrier.wait(shared.dout_ready.index(stage), phase)
            dp = _start_product(
                *(shared.v, shared.dout, stage, zero_s, opaque_false, half + HALF_INDEX)
            )
            query = visit.block * BLOCK_M
            s = warpgroup_mma_wait(1, deps=[s])
            lse = shared.lse.index(stage).load(gl.SliceLayout(0, s_layout))
            p = keys_weights(s, lse, query, bounds, multiplier, BLOCK_M, s_layout, FLAGS)
            p = computed(p, opaque_false)
            dp = warpgroup_mma_wait(0, deps=[dp])
            ds = gradient_of_logits(dp, p, shared, stage, dtype, s_layout, False)
            shared.ds.index(DS_STAGES * HALF_INDEX + slot).store(ds)
            seen = gl.convert_layout(rounded(p, dtype), p_layout)
            dv = warpgroup_mma(seen, shared.dout.index(stage), dv, is_async=True)
            fence_async_shared()
            barrier_arrive(OURS + slot, CONSUMERS, 4)
            ds_operand = gl.convert_layout(ds, p_layout)
            if FIRST:
                # Before a tile's first step nothing is awaited, and its product is not added.
                before = gl.where(slot == 0, 2, slot - 1)
                barrier_wait(DS_APART_1 + before, CONSUMERS, 4, gl.where(step > begin, 1, 0))
                dq = _start_dq(shared, before, half, zero_q, opaque_false, 0)
            else:
                dq = _start_dq(shared, slot, half, zero_q, opaque_false, 1)
            dv = warpgroup_mma_wait(1, deps=[dv])
            dk = warpgroup_mma(ds_operand, shared.q.index(stage), dk, is_async=True)
            dq = warpgroup_mma_wait(1, deps=[dq])
            if FIRST:
                last = _visit_before(visit, tile, GROUP)
                add_dq_of_step(dq, slabs, last, tile, step > begin, 0, 0, TILE)
            else:
                add_dq_of_step(dq, slabs, visit, tile, True, 64, 0, TILE)
            dk = warpgroup_mma_wait(0, deps=[dk])
            release_stage(BLOCK_EMPTY, stage, PRODUCER_AND_CONSUMERS)
            visit = _visit_after(visit, tile, GROUP)
            slot = gl.where(slot == 2, 0, slot + 1)
        offsets, inside = key_offsets(
            keys, strides.dk_token, strides.dk_head, TILE.head_dim, o_layout, 64, BLOCK_D
        )
        gl.store(pointers.dv + offsets, dv.to(dtype), mask=inside)
        gl.store(pointers.dk + offsets, (dk * scale).to(dtype), mask=inside)
        if FIRST:
            before = gl.where(slot == 0, 2, slot - 1)
            barrier_wait(DS_APART_1 + before, CONSUMERS, 4, gl.where(end > begin, 1, 0))
            dq = _start_dq(shared, before, half, zero_q, tile.high < 0, 0)
            dq = warpgroup_mma_wait(0, deps=[dq])
            last = Visit(GROUP - 1, tile.high - 1)
            add_dq_of_step(dq, slabs, last, tile, end > begin, 0, 0, TILE)
        mbarrier.arrive(shared.kv_bars.empty.index(kv_stage), count=1)
        done = end
        index += 1
        mbarrier.wait(shared.tile_bars.ready, index & 1)
        document = load_scalar(shared.tiles.index(0), 4)
