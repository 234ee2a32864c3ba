"""Forward of varlen attention for Hopper, in Gluon: TMA, wgmma, warp specialisation, persistent."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from lctrain_kernels.gluon.compat import partition_barrier, tma_store_wait
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
from lctrain_kernels.gluon.tile_rows import allocate, load_block, load_queries, store_rows
from lctrain_kernels.tile.logits import LN_2, LOG2_E

_LOG2_E = gl.constexpr(LOG2_E)
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
    q_desc, k_desc, v_desc = sources
    q_bufs, k_bufs, v_bufs, info, info_bars, q_bars, k_ready, v_ready = shared
    info_ready, info_empty = info_bars
    q_ready, q_empty = q_bars
    BLOCK_N: gl.constexpr = TILE[2]
    Q_STAGES: gl.constexpr = TILE[4]
    STAGES: gl.constexpr = TILE[5]
    THREADS: gl.constexpr = 32 + 128 * TILE[1]  # of the loader and all warpgroups
    served = 0
    ring = 0
    mbarrier.wait(info_ready.index(0), 0)
    document = scalar(info.index(0), 1)
    while document >= 0:
        end_q, length_q, end_k, length_k, first, head, low, high = read_tile(info, served, 1)
        mbarrier.arrive(info_empty.index(served % TILES_AHEAD), count=1)
        stage = served % Q_STAGES
        mbarrier.wait(q_empty.index(stage), ((served // Q_STAGES) & 1) ^ 1)
        load_queries(q_desc, q_bufs, q_ready, stage, (end_q, length_q, first, head), TILE)
        head_kv = head // GROUP
        for block in range(high - low):
            place = ring % STAGES
            row = _RAGGED - length_k + (high - 1 - block) * BLOCK_N
            keys = (end_k, row, head_kv)
            await_place(K_EMPTY, ring, STAGES, THREADS)
            load_block(k_desc, k_bufs.index(place), k_ready.index(place), keys)
            await_place(V_EMPTY, ring, STAGES, THREADS)
            load_block(v_desc, v_bufs.index(place), v_ready.index(place), keys)
            ring += 1
        served += 1
        mbarrier.wait(info_ready.index(served % TILES_AHEAD), (served // TILES_AHEAD) & 1)
        document = scalar(info.index(served % TILES_AHEAD * TILE_FIELDS), 1)
    settle_places(K_EMPTY, ring, STAGES, THREADS)
    settle_places(V_EMPTY, ring, STAGES, THREADS)


@gluon.jit
def _consume(
    common,
    TILE: gl.constexpr,
    FLAGS: gl.constexpr,
    CONSUMER: gl.constexpr,
):
    """One warpgroup: 64 rows of every tile."""
    out_desc, shared, window, pointers, numbers = common
    q_bufs, k_bufs, v_bufs, info, info_bars, q_bars, k_ready, v_ready = shared
    info_ready, info_empty = info_bars
    q_ready, q_empty = q_bars
    window_ptr, window_left, window_right = window
    lse_ptr, sink_ptr, seed_ptr, document_ids_ptr = pointers
    total_q, scale, softcap, threshold, keep_scale = numbers
    PACK: gl.constexpr = TILE[0]
    CONSUMERS: gl.constexpr = TILE[1]
    BLOCK_N: gl.constexpr = TILE[2]
    BLOCK_D: gl.constexpr = TILE[3]
    Q_STAGES: gl.constexpr = TILE[4]
    STAGES: gl.constexpr = TILE[5]
    MEET_EARLY: gl.constexpr = TILE[6]
    THREADS: gl.constexpr = 32 + 128 * TILE[1]  # of the loader and all warpgroups
    HAS_LEFT: gl.constexpr = FLAGS[0]
    HAS_RIGHT: gl.constexpr = FLAGS[1]
    HAS_SINK: gl.constexpr = FLAGS[3]
    HAS_DROPOUT: gl.constexpr = FLAGS[4]
    POSITIONS: gl.constexpr = CONSUMERS * 64 // PACK
    RUN: gl.constexpr = POSITIONS if POSITIONS < 64 else 64
    FEW_REGISTERS: gl.constexpr = POSITIONS > RUN  # what follows from two runs takes some
    FIRST_RUN: gl.constexpr = CONSUMER * (64 // RUN)
    dtype: gl.constexpr = out_desc.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
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
        last = (served + Q_STAGES - 1) % Q_STAGES
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
        random = (key_0, key_1, document_key, tile_head, first, local_query)
        m, l = nothing_seen(BLOCK_N)
        acc = gl.zeros([64, BLOCK_D], gl.float32, o_layout)
        q = q_bufs.index(stage * CONSUMERS + CONSUMER)
        mbarrier.wait(q_ready.index(stage), (served // Q_STAGES) & 1)
        if high > low:
            mbarrier.wait(k_ready.index(place), phase)
            s_token = warpgroup_mma(
                q, k_bufs.index(place).permute((1, 0)), zero, use_acc=False, is_async=True
            )
            words = block_words(random, high - 1, BLOCK_N, s_layout, HAS_DROPOUT)
            s = warpgroup_mma_wait(0, deps=[s_token])
            give_place(K_EMPTY, place, THREADS)
            p, alpha, m, l = block_weights(
                s,
                m,
                l,
                high - 1,
                rows,
                visible,
                words,
                threshold,
                scale,
                softcap,
                s_layout,
                dtype,
                FLAGS,
                FEW_REGISTERS,
            )
            if Q_STAGES > 1:
                # By now the last tile's result has left its place.
                tma_store_wait(0)
                mbarrier.arrive(q_empty.index(last), count=1, pred=served > 0)
            p = gl.convert_layout(p, p_layout)
            mbarrier.wait(v_ready.index(place), phase)
            for block in range(1, high - low):
                before = place
                place, phase = next_place(place, phase, STAGES)
                mbarrier.wait(k_ready.index(place), phase)
                if MEET_EARLY:
                    # Else the wait for values below brings the warps together.
                    partition_barrier()
                s_token = warpgroup_mma(
                    q, k_bufs.index(place).permute((1, 0)), zero, use_acc=False, is_async=True
                )
                acc_token = warpgroup_mma(p, v_bufs.index(before), acc, is_async=True)
                words = block_words(random, high - 1 - block, BLOCK_N, s_layout, HAS_DROPOUT)
                s = warpgroup_mma_wait(1, deps=[s_token])
                give_place(K_EMPTY, place, THREADS)
                p_next, alpha, m, l = block_weights(
                    s,
                    m,
                    l,
                    high - 1 - block,
                    rows,
                    visible,
                    words,
                    threshold,
                    scale,
                    softcap,
                    s_layout,
                    dtype,
                    FLAGS,
                    FEW_REGISTERS,
                    IS_FURTHER=True,
                )
                # The branch of this wait keeps ptxas from moving the next one above the weights.
                mbarrier.wait(v_ready.index(place), phase)
                acc = warpgroup_mma_wait(0, deps=[acc_token])
                give_place(V_EMPTY, before, THREADS)
                p = gl.convert_layout(p_next, p_layout)
                acc = scaled(acc, alpha, o_layout)
            acc_token = warpgroup_mma(p, v_bufs.index(place), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc_token])
            give_place(V_EMPTY, place, THREADS)
            place, phase = next_place(place, phase, STAGES)
        else:
            if Q_STAGES > 1:
                tma_store_wait(0)
                mbarrier.arrive(q_empty.index(last), count=1, pred=served > 0)
        m, l = whole_rows(m, l, row_s)
        if HAS_SINK:
            sink = gl.load(sink_ptr + tile_head).to(gl.float32) * _LOG2_E
            m_new = gl.maximum(m, sink)
            alpha = gl.exp2(m - m_new)
            l = l * alpha + gl.exp2(sink - m_new)
            acc = acc * gl.convert_layout(alpha, row_o)[:, None]
            m = m_new
        empty = l == 0.0
        whole = gl.where(empty, 1.0, l)
        inverse = gl.convert_layout(keep_scale / whole, row_o)
        lse = gl.where(empty, float("-inf"), (m + gl.log2(whole)) * _LN_2)
        row = tile_head.to(gl.int64) * total_q + end_q - length_q + query
        gl.store(lse_ptr + row, lse, mask=query < length_q)
        # The queries' place in shared memory takes the result.
        q.store((acc * inverse[:, None]).to(dtype))
        store_rows(out_desc, q, (end_q, length_q, first, head), RUN)
        if Q_STAGES == 1:
            tma_store_wait(0)
            mbarrier.arrive(q_empty.index(stage), count=1)
        served += 1
        mbarrier.wait(info_ready.index(served % TILES_AHEAD), (served // TILES_AHEAD) & 1)
        document = scalar(info.index(served % TILES_AHEAD * TILE_FIELDS), 4)
    tma_store_wait(0)


@gluon.jit(do_not_specialize=["num_items", "total_q", "window_left", "window_right", "threshold"])
def varlen_fwd_hopper_kernel(
    q_desc,
    k_desc,
    v_desc,
    out_desc,
    lse_ptr,
    cu_q_ptr,
    cu_k_ptr,
    tiles_ptr,
    counter_ptr,
    window_ptr,
    sink_ptr,
    seed_ptr,
    document_ids_ptr,
    num_items,
    total_q,
    window_left,
    window_right,
    scale,
    softcap,
    threshold,
    keep_scale,
    GROUP: gl.constexpr,
    HEADS: gl.constexpr,
    PACK: gl.constexpr,
    CONSUMERS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_D: gl.constexpr,
    Q_STAGES: gl.constexpr,
    STAGES: gl.constexpr,
    MEET_EARLY: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    HAS_SINK: gl.constexpr,
    HAS_DROPOUT: gl.constexpr,
):
    """A persistent program per multiprocessor: warpgroups of 64 rows, a loader and a scheduler.

    A tile is CONSUMERS * 64 rows: PACK query heads of one key/value head times positions; PACK is
    1 where CONSUMERS is 3. Grid: at most one program per multiprocessor. counter is a zeroed int32.
    """
    dtype: gl.constexpr = q_desc.dtype
    TILE: gl.constexpr = (PACK, CONSUMERS, BLOCK_N, BLOCK_D, Q_STAGES, STAGES, MEET_EARLY)
    shared = allocate(dtype, TILE)
    _, _, _, info, info_bars, _, _, _ = shared
    packs = (cu_q_ptr, cu_k_ptr, tiles_ptr, counter_ptr, num_items)
    window = (window_ptr, window_left, window_right)
    pointers = (lse_ptr, sink_ptr, seed_ptr, document_ids_ptr)
    numbers = (total_q, scale, softcap, threshold, keep_scale)
    FLAGS: gl.constexpr = (HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_SINK, HAS_DROPOUT)
    sources = (q_desc, k_desc, v_desc)
    common = (out_desc, shared, window, pointers, numbers)
    if CONSUMERS == 2:
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
    else:
        gl.warp_specialize(
            [
                (_consume, (common, TILE, FLAGS, 0)),
                (_consume, (common, TILE, FLAGS, 1)),
                (_consume, (common, TILE, FLAGS, 2)),
                (_load, (sources, shared, GROUP, TILE)),
                (fetch_tiles, (info, info_bars, packs, window, HEADS, TILE, FLAGS)),
            ],
            [4, 4, 1, 1],
            [160, 160, 24, 24],
        )
