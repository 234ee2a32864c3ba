"""What a warpgroup does in the backward of varlen attention for Hopper."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from lctrain_kernels.gluon.signals import (
    BLOCK_EMPTY,
    BOTH,
    DS_READY,
    LOADER_AND_BOTH,
    await_signal,
    give_place,
    signal,
)
from lctrain_kernels.gluon.step import draw_words, finished, held, kept, load_key, rounded, tanh
from lctrain_kernels.gluon.tile_keys import (
    keys_weights,
    multiply_dq,
    place_keys,
    put_dq,
    settle_dq,
)
from lctrain_kernels.tile.logits import LOG2_E
from lctrain_kernels.varlen.hopper_bwd_dq import reduce_dq

_LOG2_E = gl.constexpr(LOG2_E)


@gluon.jit
def _start(of_keys, of_queries, place, zero, never, HALF_INDEX: gl.constexpr):
    """Starts S (k and q) or dP (v and dout) of the block of queries in `place`."""
    return warpgroup_mma(
        held(of_keys, HALF_INDEX, never),
        of_queries.index(place).permute((1, 0)),
        zero,
        use_acc=False,
        is_async=True,
    )


@gluon.jit
def _draw(random, head, query, first_key, s_layout: gl.constexpr, HAS_DROPOUT: gl.constexpr):
    """Random bits of a block of weights. They need no scores, so they are drawn meanwhile."""
    words = 0
    if HAS_DROPOUT:
        key_0, key_1, document_key, _ = random
        words = draw_words(
            key_0,
            key_1,
            document_key,
            head.to(gl.uint32),
            query,
            gl.arange(0, 64, gl.SliceLayout(0, s_layout))[None, :],
            first_key,
            gl.arange(0, 64, gl.SliceLayout(1, s_layout))[:, None],
        )
    return words


@gluon.jit
def _weigh(
    s,
    words,
    lse,
    query,
    bounds,
    random,
    numbers,
    never,
    dtype: gl.constexpr,
    s_layout: gl.constexpr,
    FLAGS: gl.constexpr,
):
    """(p, p times softcap's slope), both [keys, queries] in half precision.

    Whether a weight is kept is its sign, in both. Without softcap they are the same.
    """
    scale, softcap, _ = numbers
    HAS_SOFTCAP: gl.constexpr = FLAGS[2]
    HAS_DROPOUT: gl.constexpr = FLAGS[3]
    multiplier = scale * _LOG2_E
    if HAS_SOFTCAP:
        bounded = tanh(s * (scale / softcap))
        s = bounded * (softcap * _LOG2_E)
        multiplier = 1.0
    p = keys_weights(s, lse, query, bounds, multiplier, 64, s_layout, FLAGS)
    if HAS_DROPOUT:
        local_key = gl.arange(0, 64, gl.SliceLayout(1, s_layout))
        p = gl.where(kept(words, local_key[:, None], random[3]), p, -p)
    if HAS_SOFTCAP:
        weights = rounded(p * (1.0 - bounded * bounded), dtype)
        return finished(rounded(p, dtype), never), weights
    else:
        p = finished(rounded(p, dtype), never)
        return p, p


@gluon.jit
def _kept_weights(p, HAS_DROPOUT: gl.constexpr):
    """p without the weights that are dropped, which _weigh tells by their sign."""
    if HAS_DROPOUT:
        p = gl.where(p < 0.0, gl.zeros_like(p), p)
    return p


@gluon.jit
def _leave(
    dq,
    dq_out,
    step,
    leaving,
    HEAD_DIM: gl.constexpr,
    HALF_INDEX: gl.constexpr,
    SHAPE: gl.constexpr,
    TURNED: gl.constexpr,
):
    """Sends a step's columns of dq on their way.

    Args:
        dq: Of the step, half of the columns.
        dq_out: The buffers of the adder, or, from registers (SHAPE[4]), the first slab and how many
            a head has.
        step: Which one.
        leaving: (queries of the document, its last block, query heads of a key/value head).
        HEAD_DIM: Columns beyond are padding.
        HALF_INDEX: Which half of the columns.
        SHAPE: As the kernel's.
        TURNED: As in multiply_dq.
    """
    if SHAPE[4]:
        slab_ptr, slabs_per_head = dq_out
        length_q, last, GROUP = leaving
        BLOCK_M: gl.constexpr = SHAPE[0]
        back = step // GROUP
        slabs = step % GROUP * slabs_per_head - back * (BLOCK_M // 16)
        rows = length_q - (last - back) * BLOCK_M
        reduce_dq(dq, slab_ptr + slabs.to(gl.int64) * (16 * HEAD_DIM), rows, HALF_INDEX, HEAD_DIM)
    else:
        put_dq(dq, dq_out, step, HALF_INDEX, TURNED)


@gluon.jit
def _spend(
    shared,
    ds_bufs,
    step,
    p,
    weights,
    zero,
    dk,
    dv,
    never,
    SHAPE: gl.constexpr,
    FLAGS: gl.constexpr,
    LAYOUTS: gl.constexpr,
    HALF_INDEX: gl.constexpr,
):
    """Takes a step's weights: dv, and dS, which it shows to the other warpgroup. Starts dk.

    Returns:
        dk, which is on its way, and dv.
    """
    k_bufs, v_bufs, q_bufs, do_bufs, _, delta_bufs, _, rings = shared
    _, do_ready = rings
    STAGES: gl.constexpr = SHAPE[3]
    p_layout: gl.constexpr = gl.DotOperandLayout(0, LAYOUTS[1], 2)
    place = step % STAGES
    mbarrier.wait(do_ready.index(place), (step // STAGES) & 1)
    dp = _start(v_bufs, do_bufs, place, zero, never, HALF_INDEX)
    seen = gl.convert_layout(_kept_weights(p, FLAGS[3]), p_layout)
    dv = warpgroup_mma(seen, do_bufs.index(place), dv, is_async=True)
    dp = warpgroup_mma_wait(1, deps=[dp])
    delta = delta_bufs.index(place).load(gl.SliceLayout(0, LAYOUTS[0]))
    weights = weights.to(gl.float32)
    if FLAGS[3]:
        dp = gl.where(weights > 0.0, dp, 0.0)
        weights = gl.abs(weights)
    ds = (weights * (dp - delta[None, :])).to(k_bufs.dtype)
    ds_operand = gl.convert_layout(ds, p_layout)
    # Two buffers: what is overwritten now, the other warpgroup read before it showed its last dS.
    ds_bufs.index((step & 1) * 2 + HALF_INDEX).store(ds)
    fence_async_shared()
    signal(DS_READY + 2 * (step & 1) + HALF_INDEX, BOTH, 4)
    dv = warpgroup_mma_wait(0, deps=[dv])
    return warpgroup_mma(ds_operand, q_bufs.index(place), dk, is_async=True), dv


@gluon.jit
def compute(
    inputs,
    GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    SHAPE: gl.constexpr,
    FLAGS: gl.constexpr,
    HALF_INDEX: gl.constexpr,
):
    """One warpgroup: half of the tile's keys, and half of the columns of dq.

    The next step begins before a step ends: while dq is multiplied, the next weights are found. The
    other warpgroup may be a step ahead or behind, and its products run while this one has none.
    """
    shared, dq_out, ds_bufs, results, tile, window, random, numbers = inputs
    k_bufs, _, q_bufs, _, lse_bufs, _, kv_ready, rings = shared
    q_ready, _ = rings
    dk_ptr, dv_ptr, stride_t, stride_h = results
    head_kv, _, length_q, begin_k, length_k, first, low, high = tile
    left, right = window
    seed_ptr, document_ids_ptr, document, threshold = random
    scale, _, keep_scale = numbers
    BLOCK_M: gl.constexpr = SHAPE[0]
    BLOCK_N: gl.constexpr = SHAPE[1]
    BLOCK_D: gl.constexpr = SHAPE[2]
    STAGES: gl.constexpr = SHAPE[3]
    FROM_REGISTERS: gl.constexpr = SHAPE[4]
    HAS_DROPOUT: gl.constexpr = FLAGS[3]
    HALF: gl.constexpr = BLOCK_N // 2
    COLUMNS: gl.constexpr = BLOCK_D // 2
    dtype: gl.constexpr = k_bufs.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    TURNED: gl.constexpr = COLUMNS == 64 and not FROM_REGISTERS
    DQ_ROWS: gl.constexpr = COLUMNS if TURNED else BLOCK_M
    DQ_COLUMNS: gl.constexpr = BLOCK_M if TURNED else COLUMNS
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DQ_COLUMNS, 16])
    column_s: gl.constexpr = gl.SliceLayout(0, s_layout)
    LAYOUTS: gl.constexpr = (s_layout, o_layout)

    first_key = first + HALF_INDEX * HALF
    # Bounds of what is seen, relative to this warpgroup's first key.
    keys_here = length_k - first_key
    bounds = (keys_here, keys_here - length_q + right, keys_here - length_q - left)
    key_0 = 0
    key_1 = 0
    document_key = 0
    if HAS_DROPOUT:
        key_0, key_1, document_key = load_key(seed_ptr, document_ids_ptr, document)
    random = (key_0, key_1, document_key, threshold)
    dk = gl.zeros([HALF, BLOCK_D], gl.float32, o_layout)
    dv = gl.zeros([HALF, BLOCK_D], gl.float32, o_layout)
    zero_s = gl.zeros([HALF, BLOCK_M], gl.float32, s_layout)
    zero_q = gl.zeros([DQ_ROWS, DQ_COLUMNS], gl.float32, dq_layout)
    leaving = (length_q, high - 1, GROUP)
    steps = GROUP * (high - low)
    mbarrier.wait(kv_ready, 0)
    if steps > 0:
        never = high < 0
        query = (high - 1) * BLOCK_M
        mbarrier.wait(q_ready.index(0), 0)
        s = _start(k_bufs, q_bufs, 0, zero_s, never, HALF_INDEX)
        lse = lse_bufs.index(0).load(column_s)
        words = _draw(random, head_kv * GROUP, query, first_key, s_layout, HAS_DROPOUT)
        s = warpgroup_mma_wait(0, deps=[s])
        p, weights = _weigh(
            s, words, lse, query, bounds, random, numbers, never, dtype, s_layout, FLAGS
        )
        for step in range(steps - 1):
            place = step % STAGES
            never = high - 1 - step // GROUP < 0
            dk, dv = _spend(
                *(shared, ds_bufs, step, p, weights, zero_s, dk, dv, never),
                SHAPE,
                FLAGS,
                LAYOUTS,
                HALF_INDEX,
            )
            following = (step + 1) % STAGES
            mbarrier.wait(q_ready.index(following), ((step + 1) // STAGES) & 1)
            s = _start(k_bufs, q_bufs, following, zero_s, never, HALF_INDEX)
            await_signal(DS_READY + 2 * (step & 1) + 1 - HALF_INDEX, BOTH, 4)
            dq = multiply_dq(ds_bufs, k_bufs, step & 1, zero_q, never, HALF_INDEX, TURNED)
            if HAS_DROPOUT:
                # Random bits need the registers of dq, so it leaves at once.
                dk, s, dq = warpgroup_mma_wait(0, deps=[dk, s, dq])
                _leave(dq, dq_out, step, leaving, HEAD_DIM, HALF_INDEX, SHAPE, TURNED)
            else:
                dk, s = warpgroup_mma_wait(1, deps=[dk, s])
            lse = lse_bufs.index(following).load(column_s)
            give_place(BLOCK_EMPTY, place, LOADER_AND_BOTH)
            query = (high - 1 - (step + 1) // GROUP) * BLOCK_M
            head = head_kv * GROUP + (step + 1) % GROUP
            words = _draw(random, head, query, first_key, s_layout, HAS_DROPOUT)
            p, weights = _weigh(
                s, words, lse, query, bounds, random, numbers, never, dtype, s_layout, FLAGS
            )
            if not HAS_DROPOUT:
                dq = warpgroup_mma_wait(0, deps=[dq])
                _leave(dq, dq_out, step, leaving, HEAD_DIM, HALF_INDEX, SHAPE, TURNED)
        step = steps - 1
        dk, dv = _spend(
            *(shared, ds_bufs, step, p, weights, zero_s, dk, dv, never),
            SHAPE,
            FLAGS,
            LAYOUTS,
            HALF_INDEX,
        )
        await_signal(DS_READY + 2 * (step & 1) + 1 - HALF_INDEX, BOTH, 4)
        dq = multiply_dq(ds_bufs, k_bufs, step & 1, zero_q, never, HALF_INDEX, TURNED)
        dk, dq = warpgroup_mma_wait(0, deps=[dk, dq])
        give_place(BLOCK_EMPTY, step % STAGES, LOADER_AND_BOTH)
        _leave(dq, dq_out, step, leaving, HEAD_DIM, HALF_INDEX, SHAPE, TURNED)
    if not FROM_REGISTERS:
        settle_dq(steps, HALF_INDEX)
    keys = (first_key, length_k, begin_k, head_kv)
    place_out, inside = place_keys(keys, (stride_t, stride_h), HEAD_DIM, o_layout, (HALF, BLOCK_D))
    gl.store(dv_ptr + place_out, (dv * keep_scale).to(dtype), mask=inside)
    gl.store(dk_ptr + place_out, (dk * (scale * keep_scale)).to(dtype), mask=inside)
