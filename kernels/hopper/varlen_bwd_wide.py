"""Backward of varlen attention in blocks of 128 queries, for head dims up to 64.

A block is two of 64, whose products and weights overlap, and the warpgroups meet once for both.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from lctrain.kernels.hopper.signals import (
    BOTH,
    DO_EMPTY,
    DS_FULL,
    LOADER_AND_BOTH,
    Q_EMPTY,
    await_signal,
    give_place,
)
from lctrain.kernels.hopper.step import held
from lctrain.kernels.hopper.tile_keys import keys_weights, next_block, place_keys
from lctrain.kernels.hopper.varlen_bwd_dq import reduce_dq
from lctrain.kernels.tile.logits import LOG2_E

_LOG2_E = gl.constexpr(LOG2_E)
_ROWS = gl.constexpr(64)  # queries that a warpgroup multiplies at a time


@gluon.jit
def compute_wide(
    inputs,
    GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    SHAPE: gl.constexpr,
    FLAGS: gl.constexpr,
    HALF_INDEX: gl.constexpr,
):
    """One warpgroup: half of the tile's keys, and dq of half of the queries of every block."""
    shared, slabs, ds_bufs, results, tile, window, numbers = inputs
    k_bufs, v_bufs, q_bufs, do_bufs, lse_bufs, delta_bufs, kv_ready, rings = shared
    q_ready, do_ready = rings
    slab_ptr, slabs_per_head = slabs
    dk_ptr, dv_ptr, stride_t, stride_h = results
    head_kv, _, length_q, begin_k, length_k, first, low, high = tile
    left, right = window
    scale, keep_scale = numbers
    BLOCK_M: gl.constexpr = SHAPE[0]
    BLOCK_N: gl.constexpr = SHAPE[1]
    BLOCK_D: gl.constexpr = SHAPE[2]
    STAGES: gl.constexpr = SHAPE[3]
    HALF: gl.constexpr = BLOCK_N // 2
    SLABS: gl.constexpr = BLOCK_M // 16
    dtype: gl.constexpr = k_bufs.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _ROWS, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    column_s: gl.constexpr = gl.SliceLayout(0, s_layout)

    first_key = first + HALF_INDEX * HALF
    keys_here = length_k - first_key
    bounds = (keys_here, keys_here - length_q + right, keys_here - length_q - left)
    multiplier = scale * _LOG2_E
    dk = gl.zeros([HALF, BLOCK_D], gl.float32, o_layout)
    dv = gl.zeros([HALF, BLOCK_D], gl.float32, o_layout)
    zero_s = gl.zeros([HALF, _ROWS], gl.float32, s_layout)
    zero_q = gl.zeros([_ROWS, BLOCK_D], gl.float32, o_layout)
    head = head_kv * GROUP
    block = high - 1
    # This warpgroup's dq is of these queries of a block.
    own_rows = length_q - HALF_INDEX * _ROWS
    slab_ptr += HALF_INDEX * (_ROWS * HEAD_DIM)
    mbarrier.wait(kv_ready, 0)
    for step in range(GROUP * (high - low)):
        place = step % STAGES
        phase = (step // STAGES) & 1
        query = block * BLOCK_M
        never = block < low
        k = held(k_bufs, HALF_INDEX, never)
        v = held(v_bufs, HALF_INDEX, never)
        q0 = q_bufs.index(2 * place)
        q1 = q_bufs.index(2 * place + 1)
        do0 = do_bufs.index(2 * place)
        do1 = do_bufs.index(2 * place + 1)
        ds0_bufs = 4 * (step & 1)  # two buffers, each of two blocks of both halves of the keys
        ds1_bufs = ds0_bufs + 2
        mbarrier.wait(q_ready.index(place), phase)
        s0_token = warpgroup_mma(k, q0.permute((1, 0)), zero_s, use_acc=False, is_async=True)
        mbarrier.wait(do_ready.index(place), phase)
        dp0_token = warpgroup_mma(v, do0.permute((1, 0)), zero_s, use_acc=False, is_async=True)
        s1_token = warpgroup_mma(k, q1.permute((1, 0)), zero_s, use_acc=False, is_async=True)
        lse = lse_bufs.index(2 * place).load(column_s)
        s0 = warpgroup_mma_wait(2, deps=[s0_token])
        p0 = keys_weights(s0, lse, query, bounds, multiplier, _ROWS, s_layout, FLAGS).to(dtype)
        delta = delta_bufs.index(2 * place).load(column_s)
        # A wait that never comes to be: ptxas does not move the next one above it.
        await_signal(DS_FULL, BOTH, 4, gl.where(never, 1, 0))
        dp0 = warpgroup_mma_wait(1, deps=[dp0_token])
        dv_token = warpgroup_mma(gl.convert_layout(p0, p_layout), do0, dv, is_async=True)
        dp1_token = warpgroup_mma(v, do1.permute((1, 0)), zero_s, use_acc=False, is_async=True)
        ds0 = (p0.to(gl.float32) * (dp0 - delta[None, :])).to(dtype)
        ds_bufs.index(ds0_bufs + HALF_INDEX).store(ds0)
        dk_token = warpgroup_mma(gl.convert_layout(ds0, p_layout), q0, dk, is_async=True)
        lse = lse_bufs.index(2 * place + 1).load(column_s)
        s1 = warpgroup_mma_wait(3, deps=[s1_token])
        p1 = keys_weights(s1, lse, query + _ROWS, bounds, multiplier, _ROWS, s_layout, FLAGS)
        p1 = p1.to(dtype)
        delta = delta_bufs.index(2 * place + 1).load(column_s)
        await_signal(DS_FULL, BOTH, 4, gl.where(never, 1, 0))
        dp1 = warpgroup_mma_wait(1, deps=[dp1_token])
        dv_token = warpgroup_mma(gl.convert_layout(p1, p_layout), do1, dv_token, is_async=True)
        ds1 = (p1.to(gl.float32) * (dp1 - delta[None, :])).to(dtype)
        ds_bufs.index(ds1_bufs + HALF_INDEX).store(ds1)
        fence_async_shared()
        await_signal(DS_FULL, BOTH, 4)
        dk_token = warpgroup_mma(gl.convert_layout(ds1, p_layout), q1, dk_token, is_async=True)
        dq_token = zero_q
        for half in gl.static_range(2):
            dq_token = warpgroup_mma(
                ds_bufs.index(ds0_bufs + 2 * HALF_INDEX + half).permute((1, 0)),
                held(k_bufs, half, never),
                dq_token,
                use_acc=half > 0,
                is_async=True,
            )
        dv, dk = warpgroup_mma_wait(2, deps=[dv_token, dk_token])
        give_place(DO_EMPTY, place, LOADER_AND_BOTH)
        give_place(Q_EMPTY, place, LOADER_AND_BOTH)
        dq = warpgroup_mma_wait(0, deps=[dq_token])
        reduce_dq(dq, slab_ptr, own_rows - query, 0, HEAD_DIM)
        last_block = block
        head, block = next_block(head, block, head_kv, GROUP)
        further = gl.where(block == last_block, slabs_per_head, (1 - GROUP) * slabs_per_head)
        further += (block - last_block) * SLABS
        slab_ptr += further.to(gl.int64) * (16 * HEAD_DIM)
    keys = (first_key, length_k, begin_k, head_kv)
    place_out, inside = place_keys(keys, (stride_t, stride_h), HEAD_DIM, o_layout, (HALF, BLOCK_D))
    gl.store(dv_ptr + place_out, (dv * keep_scale).to(dtype), mask=inside)
    gl.store(dk_ptr + place_out, (dk * (scale * keep_scale)).to(dtype), mask=inside)
