"""Forward of dual chunk attention for Hopper, in Gluon: varlen's, with two rows of queries a tile.

One softmax runs over the three ways of tile/chunks.py, as one loop over blocks of keys: FAR with
queries at the far position, NEAR with keys rotated by -c, OWN with both as they are.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from lctrain_kernels.gluon.compat import tma_store_wait
from lctrain_kernels.gluon.signals import (
    K_EMPTY,
    V_EMPTY,
    await_place,
    give_place,
    next_place,
    settle_places,
)
from lctrain_kernels.gluon.softmax import (
    key_words,
    masked_weights,
    nothing_seen,
    scaled,
    whole_rows,
)
from lctrain_kernels.gluon.step import keys_of_query, keys_of_tile, load_key, scalar
from lctrain_kernels.gluon.tile_list import TILE_FIELDS, TILES_AHEAD, fetch_tiles, read_tile
from lctrain_kernels.gluon.tile_rows import allocate, load_block, load_queries, store_rows
from lctrain_kernels.tile.chunks import FAR, NEAR, OWN
from lctrain_kernels.tile.logits import LN_2, LOG2_E

_LOG2_E = gl.constexpr(LOG2_E)
_LN_2 = gl.constexpr(LN_2)
_RAGGED = gl.constexpr(1 << 30)


@gluon.jit
def _blocks_of_ways(first, last, c, near, BLOCK_N: gl.constexpr, ALIGNED: gl.constexpr):
    """Blocks of keys of the queries at positions first to last, FAR, then NEAR, then OWN.

    Returns (counts, shifts, clears): the first NEAR block, the first OWN block and the number of
    all; what to add to block * BLOCK_N in NEAR and in OWN for a block's first key; and per way the
    first block that needs a mask, in keys.
    """
    far_low, far_clear, far_high = keys_of_tile(first, last, FAR, c, near, BLOCK_N, ALIGNED)
    near_low, near_clear, near_high = keys_of_tile(first, last, NEAR, c, near, BLOCK_N, ALIGNED)
    own_low, own_clear, own_high = keys_of_tile(first, last, OWN, c, near, BLOCK_N, ALIGNED)
    near_block = (gl.maximum(far_high - far_low, 0) + BLOCK_N - 1) // BLOCK_N
    own_block = near_block + (gl.maximum(near_high - near_low, 0) + BLOCK_N - 1) // BLOCK_N
    blocks = own_block + (gl.maximum(own_high - own_low, 0) + BLOCK_N - 1) // BLOCK_N
    counts = (near_block, own_block, blocks)
    shifts = (near_low - near_block * BLOCK_N, own_low - own_block * BLOCK_N)
    return counts, shifts, (far_clear, near_clear, own_clear)


@gluon.jit
def _first_key(block, counts, shifts, BLOCK_N: gl.constexpr):
    """The first key of a block."""
    near_block, own_block, _ = counts
    near_shift, own_shift = shifts
    shift = gl.where(block < own_block, near_shift, own_shift)
    return block * BLOCK_N + gl.where(block < near_block, 0, shift)


@gluon.jit
def _load(
    sources,
    shared,
    geometry,
    GROUP: gl.constexpr,
    TILE: gl.constexpr,
    HAS_DROPOUT: gl.constexpr,
):
    """Loads tile after tile, as far ahead as the buffers allow."""
    q_desc, out_desc, k_desc, k_near_desc, v_desc = sources
    q_bufs, k_bufs, v_bufs, info, info_bars, q_bars, k_ready, v_ready = shared
    info_ready, info_empty = info_bars
    q_ready, q_empty = q_bars
    chunk_length, near = geometry
    PACK: gl.constexpr = TILE[0]
    CONSUMERS: gl.constexpr = TILE[1]
    BLOCK_N: gl.constexpr = TILE[2]
    Q_STAGES: gl.constexpr = TILE[4]
    STAGES: gl.constexpr = TILE[5]
    THREADS: gl.constexpr = 32 + 128 * TILE[1]  # of the loader and all warpgroups
    POSITIONS: gl.constexpr = CONSUMERS * 64 // PACK
    served = 0
    loaded = 0  # rows of queries: one or two per tile
    ring = 0
    mbarrier.wait(info_ready.index(0), 0)
    document = scalar(info.index(0), 1)
    while document >= 0:
        end_q, length_q, end_k, length_k, first, head, _, _ = read_tile(info, served, 1)
        mbarrier.arrive(info_empty.index(served % TILES_AHEAD), count=1)
        shift = length_k - length_q
        last = gl.minimum(first + POSITIONS, length_q) - 1 + shift
        counts, shifts, _ = _blocks_of_ways(
            first + shift, last, chunk_length, near, BLOCK_N, HAS_DROPOUT
        )
        near_block, own_block, blocks = counts
        place_q = (end_q, length_q, first, head)
        if near_block > 0:
            # out holds the queries at the far position until the tile's result takes their place.
            slot = loaded % Q_STAGES
            mbarrier.wait(q_empty.index(slot), ((loaded // Q_STAGES) & 1) ^ 1)
            load_queries(out_desc, q_bufs, q_ready, slot, place_q, TILE)
            loaded += 1
        slot = loaded % Q_STAGES
        mbarrier.wait(q_empty.index(slot), ((loaded // Q_STAGES) & 1) ^ 1)
        load_queries(q_desc, q_bufs, q_ready, slot, place_q, TILE)
        loaded += 1
        head_kv = head // GROUP
        for block in range(blocks):
            place = ring % STAGES
            row = _RAGGED - length_k + _first_key(block, counts, shifts, BLOCK_N)
            keys = (end_k, row, head_kv)
            await_place(K_EMPTY, ring, STAGES, THREADS)
            if (block >= near_block) & (block < own_block):
                load_block(k_near_desc, k_bufs.index(place), k_ready.index(place), keys)
            else:
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
def _weights(
    s,
    m,
    l,
    block,
    key,
    position,
    ways,
    words,
    threshold,
    multiplier,
    s_layout: gl.constexpr,
    dtype: gl.constexpr,
    HAS_DROPOUT: gl.constexpr,
):
    """One block of the online softmax: (p in dtype, alpha, m, l); s [64, BLOCK_N] = q.k."""
    counts, clears, chunk_length, near = ways
    near_block, own_block, _ = counts
    far_clear, near_clear, own_clear = clears
    clear = gl.where(block < own_block, near_clear, own_clear)
    if key >= gl.where(block < near_block, far_clear, clear):
        way = gl.where(block < near_block, FAR, gl.where(block < own_block, NEAR, OWN))
        first_seen, last_seen = keys_of_query(position, way, chunk_length, near)
        keys = key + gl.arange(0, s.shape[1], gl.SliceLayout(0, s_layout))
        s = gl.where(keys[None, :] >= first_seen[:, None], s, float("-inf"))
        s = gl.where(keys[None, :] <= last_seen[:, None], s, float("-inf"))
    # Every block by masked_weights: to take maxima to do makes these forwards slower, by 4 % on
    # one long document.
    return masked_weights(
        s, m, l, words, threshold, multiplier, s_layout, dtype, HAS_DROPOUT, False
    )


@gluon.jit
def _consume(
    common,
    TILE: gl.constexpr,
    HAS_DROPOUT: gl.constexpr,
    CONSUMER: gl.constexpr,
):
    """One warpgroup: 64 rows of every tile."""
    out_desc, shared, geometry, pointers, numbers = common
    q_bufs, k_bufs, v_bufs, info, info_bars, q_bars, k_ready, v_ready = shared
    info_ready, info_empty = info_bars
    q_ready, q_empty = q_bars
    chunk_length, near = geometry
    lse_ptr, logit_scale_ptr, seed_ptr, document_ids_ptr = pointers
    total_q, scale, threshold, keep_scale = numbers
    PACK: gl.constexpr = TILE[0]
    CONSUMERS: gl.constexpr = TILE[1]
    BLOCK_N: gl.constexpr = TILE[2]
    BLOCK_D: gl.constexpr = TILE[3]
    Q_STAGES: gl.constexpr = TILE[4]
    STAGES: gl.constexpr = TILE[5]
    THREADS: gl.constexpr = 32 + 128 * TILE[1]  # of the loader and all warpgroups
    POSITIONS: gl.constexpr = CONSUMERS * 64 // PACK
    RUN: gl.constexpr = POSITIONS if POSITIONS < 64 else 64
    FIRST_RUN: gl.constexpr = CONSUMER * (64 // RUN)
    dtype: gl.constexpr = out_desc.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    row_s: gl.constexpr = gl.SliceLayout(1, s_layout)
    row_o: gl.constexpr = gl.SliceLayout(1, o_layout)

    local = gl.arange(0, 64, row_s)
    local_query = local % RUN
    start: gl.constexpr = FIRST_RUN % (POSITIONS // RUN) * RUN  # of this warpgroup in the tile
    zero = gl.zeros([64, BLOCK_N], gl.float32, s_layout)
    served = 0
    loaded = 0
    result = 0  # where the last tile's result lies
    place = 0
    phase = 0
    mbarrier.wait(info_ready.index(0), 0)
    document = scalar(info.index(0), 4)
    while document >= 0:
        end_q, length_q, _, length_k, tile_first, head, _, _ = read_tile(info, served, 4)
        head += FIRST_RUN // (POSITIONS // RUN)
        mbarrier.arrive(info_empty.index(served % TILES_AHEAD), count=1)
        shift = length_k - length_q
        last = gl.minimum(tile_first + POSITIONS, length_q) - 1 + shift
        counts, shifts, clears = _blocks_of_ways(
            tile_first + shift, last, chunk_length, near, BLOCK_N, HAS_DROPOUT
        )
        near_block, _, blocks = counts
        ways = (counts, clears, chunk_length, near)
        first = tile_first + start
        query = first + local_query
        position = query + shift
        tile_head = head + local // RUN
        multiplier = scale * _LOG2_E
        if logit_scale_ptr is not None:
            multiplier = multiplier * gl.load(logit_scale_ptr + document)
        key_0 = 0
        key_1 = 0
        document_key = 0
        if HAS_DROPOUT:
            key_0, key_1, document_key = load_key(seed_ptr, document_ids_ptr, document)
        random = (key_0, key_1, document_key, tile_head, first, local_query)
        m, l = nothing_seen(BLOCK_N)
        acc = gl.zeros([64, BLOCK_D], gl.float32, o_layout)
        # Queries at the far position come first, where the tile has far keys.
        far_slot = loaded % Q_STAGES
        if near_block > 0:
            mbarrier.wait(q_ready.index(far_slot), (loaded // Q_STAGES) & 1)
            loaded += 1
        slot = loaded % Q_STAGES
        mbarrier.wait(q_ready.index(slot), (loaded // Q_STAGES) & 1)
        loaded += 1
        if blocks > 0:
            mbarrier.wait(k_ready.index(place), phase)
            s_token = warpgroup_mma(
                q_bufs.index(far_slot * CONSUMERS + CONSUMER),
                k_bufs.index(place).permute((1, 0)),
                zero,
                use_acc=False,
                is_async=True,
            )
            key = _first_key(0, counts, shifts, BLOCK_N)
            words = key_words(random, key, BLOCK_N, s_layout, HAS_DROPOUT)
            s = warpgroup_mma_wait(0, deps=[s_token])
            give_place(K_EMPTY, place, THREADS)
            p, alpha, m, l = _weights(
                s,
                m,
                l,
                0,
                key,
                position,
                ways,
                words,
                threshold,
                multiplier,
                s_layout,
                dtype,
                HAS_DROPOUT,
            )
            # By now the last tile's result has left its place.
            tma_store_wait(0)
            mbarrier.arrive(q_empty.index(result), count=1, pred=served > 0)
            p = gl.convert_layout(p, p_layout)
            mbarrier.wait(v_ready.index(place), phase)
            for block in range(1, blocks):
                before = place
                place, phase = next_place(place, phase, STAGES)
                mbarrier.wait(k_ready.index(place), phase)
                s_token = warpgroup_mma(
                    q_bufs.index(
                        gl.where(block < near_block, far_slot, slot) * CONSUMERS + CONSUMER
                    ),
                    k_bufs.index(place).permute((1, 0)),
                    zero,
                    use_acc=False,
                    is_async=True,
                )
                acc_token = warpgroup_mma(p, v_bufs.index(before), acc, is_async=True)
                key = _first_key(block, counts, shifts, BLOCK_N)
                words = key_words(random, key, BLOCK_N, s_layout, HAS_DROPOUT)
                s = warpgroup_mma_wait(1, deps=[s_token])
                give_place(K_EMPTY, place, THREADS)
                if block == near_block:
                    # The last product with the queries at the far position is over.
                    mbarrier.arrive(q_empty.index(far_slot), count=1)
                p_next, alpha, m, l = _weights(
                    s,
                    m,
                    l,
                    block,
                    key,
                    position,
                    ways,
                    words,
                    threshold,
                    multiplier,
                    s_layout,
                    dtype,
                    HAS_DROPOUT,
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
            tma_store_wait(0)
            mbarrier.arrive(q_empty.index(result), count=1, pred=served > 0)
        m, l = whole_rows(m, l, row_s)
        empty = l == 0.0
        whole = gl.where(empty, 1.0, l)
        inverse = gl.convert_layout(keep_scale / whole, row_o)
        lse = gl.where(empty, float("-inf"), (m + gl.log2(whole)) * _LN_2)
        row = tile_head.to(gl.int64) * total_q + (end_q - length_q + query)
        gl.store(lse_ptr + row, lse, mask=query < length_q)
        # The queries' place in shared memory takes the result.
        q = q_bufs.index(slot * CONSUMERS + CONSUMER)
        q.store((acc * inverse[:, None]).to(dtype))
        store_rows(out_desc, q, (end_q, length_q, first, head), RUN)
        result = slot
        served += 1
        mbarrier.wait(info_ready.index(served % TILES_AHEAD), (served // TILES_AHEAD) & 1)
        document = scalar(info.index(served % TILES_AHEAD * TILE_FIELDS), 4)
    tma_store_wait(0)


@gluon.jit(do_not_specialize=["num_items", "total_q", "chunk_length", "near", "threshold"])
def dual_chunk_fwd_hopper_kernel(
    q_desc,
    k_desc,
    k_near_desc,
    v_desc,
    out_desc,
    lse_ptr,
    cu_q_ptr,
    cu_k_ptr,
    tiles_ptr,
    counter_ptr,
    logit_scale_ptr,
    seed_ptr,
    document_ids_ptr,
    num_items,
    total_q,
    chunk_length,
    near,
    scale,
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
    HAS_DROPOUT: gl.constexpr,
):
    """A persistent program per multiprocessor, as varlen_fwd_hopper_kernel.

    Grid: at most one program per multiprocessor. k_near [Tk, Hk, D] as dual_chunk_rotate writes it,
    logit_scale [N] float32. out holds the queries at the far position when the kernel begins: the
    rows of a tile are read before they are written, and by that tile alone. Q_STAGES of 3 holds
    both rows of a tile, and one of the next.
    """
    dtype: gl.constexpr = q_desc.dtype
    TILE: gl.constexpr = (PACK, CONSUMERS, BLOCK_N, BLOCK_D, Q_STAGES, STAGES)
    shared = allocate(dtype, TILE)
    _, _, _, info, info_bars, _, _, _ = shared
    packs = (cu_q_ptr, cu_k_ptr, tiles_ptr, counter_ptr, num_items)
    geometry = (chunk_length, near)
    pointers = (lse_ptr, logit_scale_ptr, seed_ptr, document_ids_ptr)
    numbers = (total_q, scale, threshold, keep_scale)
    CAUSAL: gl.constexpr = (False, True)  # HAS_LEFT, HAS_RIGHT of fetch_tiles
    sources = (q_desc, out_desc, k_desc, k_near_desc, v_desc)
    common = (out_desc, shared, geometry, pointers, numbers)
    gl.warp_specialize(
        [
            (_consume, (common, TILE, HAS_DROPOUT, 0)),
            (_consume, (common, TILE, HAS_DROPOUT, 1)),
            (_load, (sources, shared, geometry, GROUP, TILE, HAS_DROPOUT)),
            (fetch_tiles, (info, info_bars, packs, (None, -1, 0), HEADS, TILE, CAUSAL)),
        ],
        [4, 1, 1],
        # The loader of two tiles of queries spills with 24, and so do random bits with 232.
        [240, 24, 24] if HAS_DROPOUT else [232, 40, 40],
    )
