"""Backward of varlen attention for Hopper, in Gluon: five products, dq added up in float32."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from lctrain_kernels.gluon.compat import copy_arrive, copy_async
from lctrain_kernels.gluon.signals import (
    BLOCK_EMPTY,
    LOADER_AND_BOTH,
    await_place,
    settle_places,
)
from lctrain_kernels.gluon.step import load_window, query_blocks
from lctrain_kernels.gluon.tile_keys import (
    allocate_dq,
    allocate_rings,
    load_rows,
    next_block,
    read_slot,
)
from lctrain_kernels.gluon.tile_rows import load_block
from lctrain_kernels.varlen.hopper_bwd_compute import compute
from lctrain_kernels.varlen.hopper_bwd_dq import add_dq, finish_dq, first_slab

_RAGGED = gl.constexpr(1 << 30)


@gluon.jit
def _locate(packs, window, HEADS_KV: gl.constexpr, SHAPE: gl.constexpr, FLAGS: gl.constexpr):
    """(document, tile) of this program; of an empty slot document 0, no queries and no keys."""
    left, right = window
    BLOCK_M: gl.constexpr = SHAPE[0]
    BLOCK_N: gl.constexpr = SHAPE[1]
    slot = read_slot(packs, HEADS_KV, BLOCK_N)
    head_kv, document, first, begin_q, length_q, begin_k, length_k = slot
    low, high = query_blocks(
        first, BLOCK_N, length_k - length_q, length_q, left, right, FLAGS[0], FLAGS[1], BLOCK_M
    )
    high = gl.where(document < 0, low, high)
    length_k = gl.where(document < 0, 0, length_k)
    tile = (head_kv, begin_q, length_q, begin_k, length_k, first, low, high)
    return gl.maximum(document, 0), tile


@gluon.jit
def _load(
    q_desc,
    do_desc,
    k_desc,
    v_desc,
    shared,
    stats,
    tile,
    GROUP: gl.constexpr,
    SHAPE: gl.constexpr,
):
    """Loads a tile's keys and values, then the queries of every head of its group."""
    k_bufs, v_bufs, q_bufs, do_bufs, lse_bufs, delta_bufs, kv_ready, rings = shared
    q_ready, do_ready = rings
    lse_ptr, delta_ptr, total_q = stats
    head_kv, begin_q, length_q, begin_k, length_k, first, low, high = tile
    BLOCK_M: gl.constexpr = SHAPE[0]
    BLOCK_N: gl.constexpr = SHAPE[1]
    BLOCK_D: gl.constexpr = SHAPE[2]
    STAGES: gl.constexpr = SHAPE[3]
    keys = (begin_k + length_k, _RAGGED - length_k + first, head_kv)
    mbarrier.expect(kv_ready, 2 * BLOCK_N * BLOCK_D * 2)
    load_rows(k_desc, k_bufs, 0, kv_ready, keys)
    load_rows(v_desc, v_bufs, 0, kv_ready, keys)
    lanes: gl.constexpr = gl.BlockedLayout([BLOCK_M // 32], [32], [1], [0])
    local = gl.arange(0, BLOCK_M, lanes)
    head = head_kv * GROUP
    block = high - 1
    steps = GROUP * (high - low)
    for step in range(steps):
        place = step % STAGES
        first_query = block * BLOCK_M
        vector = head.to(gl.int64) * total_q + begin_q + first_query + local
        left_here = length_q - first_query
        queries = (begin_q + length_q, _RAGGED - left_here, head)
        await_place(BLOCK_EMPTY, step, STAGES, LOADER_AND_BOTH)
        copy_async(lse_bufs.index(place), lse_ptr + vector, mask=local < left_here)
        copy_arrive(q_ready.index(place))
        load_block(q_desc, q_bufs.index(place), q_ready.index(place), queries)
        copy_async(delta_bufs.index(place), delta_ptr + vector, mask=local < left_here)
        copy_arrive(do_ready.index(place))
        load_block(do_desc, do_bufs.index(place), do_ready.index(place), queries)
        head, block = next_block(head, block, head_kv, GROUP)
    settle_places(BLOCK_EMPTY, steps, STAGES, LOADER_AND_BOTH)


@gluon.jit(
    do_not_specialize=[
        "per_head",
        "total_q",
        "window_left",
        "window_right",
        "threshold",
    ]
)
def varlen_bwd_hopper_kernel(
    q_desc,
    do_desc,
    k_desc,
    v_desc,
    dq_desc,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    sum_ptr,
    dq_ptr,
    cu_q_ptr,
    cu_k_ptr,
    tiles_ptr,
    window_ptr,
    seed_ptr,
    document_ids_ptr,
    turns_ptr,
    per_head,
    stride_t,
    stride_h,
    stride_dqt,
    stride_dqh,
    total_q,
    window_left,
    window_right,
    scale,
    softcap,
    threshold,
    keep_scale,
    GROUP: gl.constexpr,
    HEADS_KV: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr,
    DETERMINISTIC: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    HAS_DROPOUT: gl.constexpr,
):
    """One program: BLOCK_N keys of one key/value head, with all queries of its group that see them.

    Grid: (tiles * key/value heads,). lse and delta [H, T] float32: base 2, +inf where nothing was
    seen, and delta / keep_scale. dq_desc describes sum, a float32 [T, H, D]; dq, of its layout, is
    written, but for rows that see no key; turns is a zeroed int32 [H, blocks of queries]. Programs
    must start in order, since they wait for earlier ones. Without dq_desc, sum is as first_slab has
    it, zeroed, and there are neither turns nor dq. per_head: turns, or slabs, of a head. BLOCK_M is
    64.
    """
    gl.static_assert(BLOCK_M == 64, "the warpgroups multiply 64 queries at a time")
    gl.static_assert(STAGES >= 2, "queries of the next step are awaited before a step's are read")
    dtype: gl.constexpr = q_desc.dtype
    HALF: gl.constexpr = BLOCK_N // 2
    FROM_REGISTERS: gl.constexpr = dq_desc is None
    SHAPE: gl.constexpr = (BLOCK_M, BLOCK_N, BLOCK_D, STAGES, FROM_REGISTERS)
    FLAGS: gl.constexpr = (HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_DROPOUT)
    packs = (cu_q_ptr, cu_k_ptr, tiles_ptr)
    window = load_window(window_ptr, window_left, window_right)
    document, tile = _locate(packs, window, HEADS_KV, SHAPE, FLAGS)

    word: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    n_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF, BLOCK_D], dtype)
    m_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, BLOCK_D], dtype)
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF, BLOCK_M], dtype)
    k_bufs = gl.allocate_shared_memory(dtype, [2, HALF, BLOCK_D], n_layout)
    v_bufs = gl.allocate_shared_memory(dtype, [2, HALF, BLOCK_D], n_layout)
    q_bufs = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_D], m_layout)
    do_bufs = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_D], m_layout)
    ds_bufs = gl.allocate_shared_memory(dtype, [4, HALF, BLOCK_M], ds_layout)
    if FROM_REGISTERS:
        slab_ptr = first_slab(sum_ptr, per_head, tile, document, GROUP, HEAD_DIM, BLOCK_M)
        dq_out = (slab_ptr, per_head)
    else:
        dq_out = allocate_dq(BLOCK_M, BLOCK_D // 2)
    lse_bufs = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], word)
    delta_bufs = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], word)
    kv_ready = gl.allocate_shared_memory(gl.int64, [1], bar)
    rings = allocate_rings(STAGES)
    mbarrier.init(kv_ready, count=1)
    shared = (k_bufs, v_bufs, q_bufs, do_bufs, lse_bufs, delta_bufs, kv_ready, rings)
    results = (dk_ptr, dv_ptr, stride_t, stride_h)
    random = (seed_ptr, document_ids_ptr, document, threshold)
    numbers = (scale, softcap, keep_scale)
    stats = (lse_ptr, delta_ptr, total_q)
    turns = (turns_ptr, per_head, document)
    inputs = (shared, dq_out, ds_bufs, results, tile, window, random, numbers)
    if FROM_REGISTERS:
        gl.warp_specialize(
            [
                (compute, (inputs, GROUP, HEAD_DIM, SHAPE, FLAGS, 0)),
                (compute, (inputs, GROUP, HEAD_DIM, SHAPE, FLAGS, 1)),
                (_load, (q_desc, do_desc, k_desc, v_desc, shared, stats, tile, GROUP, SHAPE)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [
                (compute, (inputs, GROUP, HEAD_DIM, SHAPE, FLAGS, 0)),
                (compute, (inputs, GROUP, HEAD_DIM, SHAPE, FLAGS, 1)),
                (_load, (q_desc, do_desc, k_desc, v_desc, shared, stats, tile, GROUP, SHAPE)),
                (add_dq, (dq_desc, dq_out, turns, tile, window, GROUP, SHAPE, DETERMINISTIC)),
            ],
            [4, 1, 1],
            [240, 24, 24],
        )
    if not FROM_REGISTERS:
        # Found anew, so that nothing of it takes registers of the loops.
        window = load_window(window_ptr, window_left, window_right)
        document, tile = _locate(packs, window, HEADS_KV, SHAPE, FLAGS)
        finish_dq(
            (sum_ptr, dq_ptr, stride_dqt, stride_dqh),
            (turns_ptr, per_head, document),
            tile,
            window,
            scale * keep_scale,
            GROUP,
            HEAD_DIM,
            SHAPE,
            FLAGS,
        )
