"""Forward of differential attention for Hopper, in Gluon: both branches in every warpgroup."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from lctrain_kernels.gluon.compat import reinterpret, tma_store_wait
from lctrain_kernels.gluon.signals import (
    K_EMPTY,
    V_EMPTY,
    await_place,
    give_place,
    next_place,
    settle_places,
)
from lctrain_kernels.gluon.softmax import (
    block_weights,
    block_words,
    nothing_seen,
    scaled,
    whole_rows,
)
from lctrain_kernels.gluon.step import load_key, load_window, scalar
from lctrain_kernels.gluon.tile_list import TILE_FIELDS, TILES_AHEAD, fetch_tiles, read_tile
from lctrain_kernels.gluon.tile_rows import load_block, load_queries, store_rows
from lctrain_kernels.tile.logits import LN_2

_LN_2 = gl.constexpr(LN_2)
_RAGGED = gl.constexpr(1 << 30)


@gluon.jit
def _load(
    sources,
    shared,
    GROUP: gl.constexpr,
    TILE: gl.constexpr,
):
    """Loads tile after tile, as far ahead as the buffers allow."""
    q_descs, k_descs, v_desc = sources
    q_bufs, k_bufs, v_bufs, _, info, info_bars, q_bars, k_ready, v_ready = shared
    info_ready, info_empty = info_bars
    q_ready, q_empty = q_bars
    BLOCK_N: gl.constexpr = TILE[2]
    Q_STAGES: gl.constexpr = TILE[4]
    STAGES: gl.constexpr = TILE[5]
    THREADS: gl.constexpr = 32 + 128 * TILE[1]  # of the loader and all warpgroups
    KEYS: gl.constexpr = TILE[7]
    served = 0
    ring = 0
    mbarrier.wait(info_ready.index(0), 0)
    document = scalar(info.index(0), 1)
    while document >= 0:
        end_q, length_q, end_k, length_k, first, head, low, high = read_tile(info, served, 1)
        mbarrier.arrive(info_empty.index(served % TILES_AHEAD), count=1)
        stage = served % Q_STAGES
        place_q = (end_q, length_q, first, head)
        mbarrier.wait(q_empty.index(stage), ((served // Q_STAGES) & 1) ^ 1)
        for branch in gl.static_range(2):
            load_queries(q_descs[branch], q_bufs, q_ready, stage, place_q, TILE, branch, 2)
        head_kv = head // GROUP
        for block in range(high - low):
            place = ring % STAGES
            row = _RAGGED - length_k + (high - 1 - block) * BLOCK_N
            keys = (end_k, row, head_kv)
            await_place(K_EMPTY, ring, STAGES, THREADS)
            for branch in gl.static_range(KEYS):
                k_buf = k_bufs.index(place * KEYS + branch)
                load_block(k_descs[branch], k_buf, k_ready.index(place), keys)
            await_place(V_EMPTY, ring, STAGES, THREADS)
            load_block(v_desc, v_bufs.index(place), v_ready.index(place), keys)
            ring += 1
        served += 1
        mbarrier.wait(info_ready.index(served % TILES_AHEAD), (served // TILES_AHEAD) & 1)
        document = scalar(info.index(served % TILES_AHEAD * TILE_FIELDS), 1)
    settle_places(K_EMPTY, ring, STAGES, THREADS)
    settle_places(V_EMPTY, ring, STAGES, THREADS)


@gluon.jit
def _finish(m, l, keep_scale, row_s: gl.constexpr, row_o: gl.constexpr):
    """Of one branch: (the factor of its sum, lse)."""
    m, l = whole_rows(m, l, row_s)
    empty = l == 0.0
    whole = gl.where(empty, 1.0, l)
    lse = gl.where(empty, float("-inf"), (m + gl.log2(whole)) * _LN_2)
    return gl.convert_layout(keep_scale / whole, row_o), lse


@gluon.jit
def _consume(
    common,
    TILE: gl.constexpr,
    FLAGS: gl.constexpr,
    CONSUMER: gl.constexpr,
):
    """One warpgroup: both branches of 64 rows of every tile."""
    out_descs, shared, window, pointers, lam_strides, numbers = common
    out_desc, out1_desc, out2_desc = out_descs
    q_bufs, k_bufs, v_bufs, out_bufs, info, info_bars, q_bars, k_ready, v_ready = shared
    info_ready, info_empty = info_bars
    q_ready, q_empty = q_bars
    window_ptr, window_left, window_right = window
    lam_ptr, lse1_ptr, lse2_ptr, seed_ptr, document_ids_ptr = pointers
    stride_lt, stride_lh = lam_strides
    total_q, scale, threshold, keep_scale = numbers
    PACK: gl.constexpr = TILE[0]
    CONSUMERS: gl.constexpr = TILE[1]
    BLOCK_N: gl.constexpr = TILE[2]
    BLOCK_D: gl.constexpr = TILE[3]
    Q_STAGES: gl.constexpr = TILE[4]
    STAGES: gl.constexpr = TILE[5]
    THREADS: gl.constexpr = 32 + 128 * TILE[1]  # of the loader and all warpgroups
    BLOCK_DV: gl.constexpr = TILE[6]
    # Values and maxima of 128 columns leave no registers for weights beside logits.
    SPECULATES: gl.constexpr = BLOCK_D == 64
    KEYS: gl.constexpr = TILE[7]
    HAS_LEFT: gl.constexpr = FLAGS[0]
    HAS_RIGHT: gl.constexpr = FLAGS[1]
    HAS_DROPOUT: gl.constexpr = FLAGS[4]
    POSITIONS: gl.constexpr = CONSUMERS * 64 // PACK
    RUN: gl.constexpr = POSITIONS if POSITIONS < 64 else 64
    FIRST_RUN: gl.constexpr = CONSUMER * (64 // RUN)
    IN_Q: gl.constexpr = 2 * BLOCK_D // BLOCK_DV  # results that the queries' place holds
    dtype: gl.constexpr = out_desc.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_DV, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_D], dtype)
    out_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_DV], dtype)
    row_s: gl.constexpr = gl.SliceLayout(1, s_layout)
    row_o: gl.constexpr = gl.SliceLayout(1, o_layout)

    left, right = load_window(window_ptr, window_left, window_right)
    local = gl.arange(0, 64, row_s)
    start: gl.constexpr = FIRST_RUN % (POSITIONS // RUN) * RUN  # of this warpgroup in the tile
    zero = gl.zeros([64, BLOCK_N], gl.float32, s_layout)
    served = 0
    place = 0
    phase = 0
    mbarrier.wait(info_ready.index(0), 0)
    document = scalar(info.index(0), 4)
    while document >= 0:
        end_q, length_q, _, length_k, first, head, low, high = read_tile(info, served, 4)
        first += start
        head += FIRST_RUN // (POSITIONS // RUN)
        mbarrier.arrive(info_empty.index(served % TILES_AHEAD), count=1)
        stage = served % Q_STAGES
        shift = length_k - length_q
        local_query = local % RUN
        query = first + local_query
        tile_head = head + local // RUN
        if HAS_RIGHT and POSITIONS > RUN:
            # Blocks that only later rows of the tile see.
            seen = gl.minimum(gl.maximum(first + RUN + shift + right, 0), length_k)
            own = gl.maximum((seen + BLOCK_N - 1) // BLOCK_N, low)
            for _ in range(high - own):
                mbarrier.wait(k_ready.index(place), phase)
                give_place(K_EMPTY, place, THREADS)
                mbarrier.wait(v_ready.index(place), phase)
                give_place(V_EMPTY, place, THREADS)
                place, phase = next_place(place, phase, STAGES)
            high = own
        clear_high = length_k
        if HAS_RIGHT:
            clear_high = gl.minimum(length_k, first + shift + right + 1)
        clear_low = 0
        if HAS_LEFT:
            clear_low = first + RUN - 1 + shift - left
        key_0 = 0
        key_1 = 0
        document_key = 0
        if HAS_DROPOUT:
            key_0, key_1, document_key = load_key(seed_ptr, document_ids_ptr, document)
        rows = (first, local_query)
        visible = (shift, length_k, left, right, clear_low, clear_high)
        random1 = (key_0, key_1, document_key, 2 * tile_head, first, local_query)
        random2 = (key_0, key_1, document_key, 2 * tile_head + 1, first, local_query)
        m1, l1 = nothing_seen(BLOCK_N)
        m2, l2 = nothing_seen(BLOCK_N)
        acc1 = gl.zeros([64, BLOCK_DV], gl.float32, o_layout)
        acc2 = gl.zeros([64, BLOCK_DV], gl.float32, o_layout)
        queries = q_bufs.index(stage * CONSUMERS + CONSUMER)
        q = reinterpret(queries, dtype, [2, 64, BLOCK_D], q_layout)
        mbarrier.wait(q_ready.index(stage), (served // Q_STAGES) & 1)
        if high > low:
            mbarrier.wait(k_ready.index(place), phase)
            s1_token = warpgroup_mma(
                q.index(0),
                k_bufs.index(place * KEYS).permute((1, 0)),
                zero,
                use_acc=False,
                is_async=True,
            )
            words = block_words(random1, high - 1, BLOCK_N, s_layout, HAS_DROPOUT)
            s1 = warpgroup_mma_wait(0, deps=[s1_token])
            p, alpha, m1, l1 = block_weights(
                s1,
                m1,
                l1,
                high - 1,
                rows,
                visible,
                words,
                threshold,
                scale,
                0.0,
                s_layout,
                dtype,
                FLAGS,
            )
            p1 = gl.convert_layout(p, p_layout)
            if Q_STAGES > 1:
                # By now the last tile's results have left their places.
                tma_store_wait(0)
                mbarrier.arrive(q_empty.index((served + 1) % Q_STAGES), count=1, pred=served > 0)
            mbarrier.wait(v_ready.index(place), phase)
            s2_token = warpgroup_mma(
                q.index(1),
                k_bufs.index(place * KEYS + KEYS - 1).permute((1, 0)),
                zero,
                use_acc=False,
                is_async=True,
            )
            acc1_token = warpgroup_mma(p1, v_bufs.index(place), acc1, is_async=True)
            words = block_words(random2, high - 1, BLOCK_N, s_layout, HAS_DROPOUT)
            s2 = warpgroup_mma_wait(1, deps=[s2_token])
            give_place(K_EMPTY, place, THREADS)
            p, alpha, m2, l2 = block_weights(
                s2,
                m2,
                l2,
                high - 1,
                rows,
                visible,
                words,
                threshold,
                scale,
                0.0,
                s_layout,
                dtype,
                FLAGS,
            )
            # A wait that is over long since: ptxas does not move the next one above its branch.
            mbarrier.wait(v_ready.index(place), phase)
            acc1 = warpgroup_mma_wait(0, deps=[acc1_token])
            p2 = gl.convert_layout(p, p_layout)
            for block in range(1, high - low):
                # The first branch of a block, while the values before it meet the second branch.
                before = place
                place, phase = next_place(place, phase, STAGES)
                mbarrier.wait(k_ready.index(place), phase)
                s1_token = warpgroup_mma(
                    q.index(0),
                    k_bufs.index(place * KEYS).permute((1, 0)),
                    zero,
                    use_acc=False,
                    is_async=True,
                )
                acc2_token = warpgroup_mma(p2, v_bufs.index(before), acc2, is_async=True)
                words = block_words(random1, high - 1 - block, BLOCK_N, s_layout, HAS_DROPOUT)
                s1 = warpgroup_mma_wait(1, deps=[s1_token])
                p, alpha, m1, l1 = block_weights(
                    s1,
                    m1,
                    l1,
                    high - 1 - block,
                    rows,
                    visible,
                    words,
                    threshold,
                    scale,
                    0.0,
                    s_layout,
                    dtype,
                    FLAGS,
                    IS_FURTHER=SPECULATES,
                )
                mbarrier.wait(v_ready.index(place), phase)
                acc2 = warpgroup_mma_wait(0, deps=[acc2_token])
                give_place(V_EMPTY, before, THREADS)
                p1 = gl.convert_layout(p, p_layout)
                acc1 = scaled(acc1, alpha, o_layout)
                # Then the second branch, while these values meet the first.
                s2_token = warpgroup_mma(
                    q.index(1),
                    k_bufs.index(place * KEYS + KEYS - 1).permute((1, 0)),
                    zero,
                    use_acc=False,
                    is_async=True,
                )
                acc1_token = warpgroup_mma(p1, v_bufs.index(place), acc1, is_async=True)
                words = block_words(random2, high - 1 - block, BLOCK_N, s_layout, HAS_DROPOUT)
                s2 = warpgroup_mma_wait(1, deps=[s2_token])
                give_place(K_EMPTY, place, THREADS)
                p, alpha, m2, l2 = block_weights(
                    s2,
                    m2,
                    l2,
                    high - 1 - block,
                    rows,
                    visible,
                    words,
                    threshold,
                    scale,
                    0.0,
                    s_layout,
                    dtype,
                    FLAGS,
                    IS_FURTHER=SPECULATES,
                )
                mbarrier.wait(v_ready.index(place), phase)
                acc1 = warpgroup_mma_wait(0, deps=[acc1_token])
                p2 = gl.convert_layout(p, p_layout)
                acc2 = scaled(acc2, alpha, o_layout)
            acc2_token = warpgroup_mma(p2, v_bufs.index(place), acc2, is_async=True)
            acc2 = warpgroup_mma_wait(0, deps=[acc2_token])
            give_place(V_EMPTY, place, THREADS)
            place, phase = next_place(place, phase, STAGES)
        else:
            if Q_STAGES > 1:
                tma_store_wait(0)
                mbarrier.arrive(q_empty.index((served + 1) % Q_STAGES), count=1, pred=served > 0)
        inverse1, lse1 = _finish(m1, l1, keep_scale, row_s, row_o)
        inverse2, lse2 = _finish(m2, l2, keep_scale, row_s, row_o)
        inside = query < length_q
        token = (end_q - length_q + query).to(gl.int64)
        row = tile_head.to(gl.int64) * total_q + token
        gl.store(lse1_ptr + row, lse1, mask=inside)
        gl.store(lse2_ptr + row, lse2, mask=inside)
        place_lam = lam_ptr + token * stride_lt + tile_head.to(gl.int64) * stride_lh
        lam = gl.convert_layout(gl.load(place_lam, mask=inside, other=0.0), row_o)
        # The queries' place in shared memory takes the results that it holds.
        results = reinterpret(queries, dtype, [IN_Q, 64, BLOCK_DV], out_layout)
        out1 = acc1 * inverse1[:, None]
        out2 = acc2 * inverse2[:, None]
        place_out = results.index(0)
        place_out2 = out_bufs.index(CONSUMER * (3 - IN_Q))
        place_out1 = results.index(1) if IN_Q == 2 else out_bufs.index(CONSUMER * 2 + 1)
        place_out1.store(out1.to(dtype))
        place_out2.store(out2.to(dtype))
        place_out.store((out1 - lam[:, None] * out2).to(dtype))
        place_rows = (end_q, length_q, first, head)
        store_rows(out_desc, place_out, place_rows, RUN)
        store_rows(out1_desc, place_out1, place_rows, RUN)
        store_rows(out2_desc, place_out2, place_rows, RUN)
        if Q_STAGES == 1:
            tma_store_wait(0)
            mbarrier.arrive(q_empty.index(stage), count=1)
        served += 1
        mbarrier.wait(info_ready.index(served % TILES_AHEAD), (served // TILES_AHEAD) & 1)
        document = scalar(info.index(served % TILES_AHEAD * TILE_FIELDS), 4)
    tma_store_wait(0)


@gluon.jit(
    do_not_specialize=[
        "stride_lt",
        "stride_lh",
        "num_items",
        "total_q",
        "window_left",
        "window_right",
        "threshold",
    ]
)
def differential_fwd_hopper_kernel(
    q1_desc,
    q2_desc,
    k1_desc,
    k2_desc,
    v_desc,
    out_desc,
    out1_desc,
    out2_desc,
    lam_ptr,
    lse1_ptr,
    lse2_ptr,
    cu_q_ptr,
    cu_k_ptr,
    tiles_ptr,
    counter_ptr,
    window_ptr,
    seed_ptr,
    document_ids_ptr,
    stride_lt,
    stride_lh,
    num_items,
    total_q,
    window_left,
    window_right,
    scale,
    threshold,
    keep_scale,
    GROUP: gl.constexpr,
    HEADS: gl.constexpr,
    PACK: gl.constexpr,
    CONSUMERS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BLOCK_DV: gl.constexpr,
    Q_STAGES: gl.constexpr,
    STAGES: gl.constexpr,
    SHARED_K: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
    HAS_DROPOUT: gl.constexpr,
):
    """A persistent program per multiprocessor: warpgroups of 64 rows, a loader and a scheduler.

    As varlen_fwd_hopper_kernel, with both branches of a row in one warpgroup: while it computes the
    weights of one, the products of the other run. lam [T, H] float32, any strides; out, out1 = A1 v
    and out2 = A2 v [T, H, Dv]; lse1, lse2 [H, T] float32. k2_desc is None with SHARED_K.
    """
    dtype: gl.constexpr = q1_desc.dtype
    KEYS: gl.constexpr = 1 if SHARED_K else 2
    STAGED: gl.constexpr = 3 - 2 * BLOCK_D // BLOCK_DV  # results that have places of their own
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([128, BLOCK_D], dtype)
    k_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_D], dtype)
    v_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_DV], dtype)
    out_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_DV], dtype)
    word: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    q_bufs = gl.allocate_shared_memory(dtype, [Q_STAGES * CONSUMERS, 128, BLOCK_D], q_layout)
    k_bufs = gl.allocate_shared_memory(dtype, [STAGES * KEYS, BLOCK_N, BLOCK_D], k_layout)
    v_bufs = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_DV], v_layout)
    out_bufs = gl.allocate_shared_memory(dtype, [CONSUMERS * STAGED, 64, BLOCK_DV], out_layout)
    info = gl.allocate_shared_memory(gl.int32, [TILES_AHEAD * TILE_FIELDS, 1], word)
    info_ready = gl.allocate_shared_memory(gl.int64, [TILES_AHEAD, 1], bar)
    info_empty = gl.allocate_shared_memory(gl.int64, [TILES_AHEAD, 1], bar)
    q_ready = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], bar)
    q_empty = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], bar)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    for i in gl.static_range(TILES_AHEAD):
        mbarrier.init(info_ready.index(i), count=1)
        mbarrier.init(info_empty.index(i), count=CONSUMERS + 1)
    for i in gl.static_range(Q_STAGES):
        mbarrier.init(q_ready.index(i), count=2)
        mbarrier.init(q_empty.index(i), count=CONSUMERS)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=KEYS)
        mbarrier.init(v_ready.index(i), count=1)
    info_bars = (info_ready, info_empty)
    q_bars = (q_ready, q_empty)
    shared = (q_bufs, k_bufs, v_bufs, out_bufs, info, info_bars, q_bars, k_ready, v_ready)
    packs = (cu_q_ptr, cu_k_ptr, tiles_ptr, counter_ptr, num_items)
    window = (window_ptr, window_left, window_right)
    pointers = (lam_ptr, lse1_ptr, lse2_ptr, seed_ptr, document_ids_ptr)
    numbers = (total_q, scale, threshold, keep_scale)
    TILE: gl.constexpr = (PACK, CONSUMERS, BLOCK_N, BLOCK_D, Q_STAGES, STAGES, BLOCK_DV, KEYS)
    # No softcap and no sinks: the flags are those that block_weights reads.
    FLAGS: gl.constexpr = (HAS_LEFT, HAS_RIGHT, False, False, HAS_DROPOUT)
    sources = ((q1_desc, q2_desc), (k1_desc, k2_desc), v_desc)
    out_descs = (out_desc, out1_desc, out2_desc)
    common = (out_descs, shared, window, pointers, (stride_lt, stride_lh), numbers)
    gl.warp_specialize(
        [
            (_consume, (common, TILE, FLAGS, 0)),
            (_consume, (common, TILE, FLAGS, 1)),
            (_load, (sources, shared, GROUP, TILE)),
            (fetch_tiles, (info, info_bars, packs, window, HEADS, TILE, FLAGS)),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )
