"""Device helpers of the Hopper backward kernels: tiles of keys, loads, masks and partial dq."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
)

from lctrain_kernels.gluon.barriers import (
    DQ_EMPTY,
    DQ_READY,
    DQ_WARP_AND_CONSUMER,
    barrier_arrive,
    barrier_wait,
)
from lctrain_kernels.gluon.compat import reinterpret, tma_load, tma_store_wait
from lctrain_kernels.gluon.coordinates import RAGGED
from lctrain_kernels.gluon.primitives import rematerialised
from lctrain_kernels.gluon.structures import KeySlot


@gluon.jit
def read_slot(cu_q_ptr, cu_k_ptr, tiles_ptr, HEADS_KV: gl.constexpr, BLOCK_N: gl.constexpr):
    """Returns the KeySlot of this program.

    The tiles of a document have adjacent programs, head after head, because they share queries in
    L2. The grid has one dimension, because the second and third dimension are limited to 65,535. An
    empty slot of the schedule has document -1 and the lengths of document 0.
    """
    program = gl.program_id(0)
    slot = program // HEADS_KV
    document = gl.load(tiles_ptr + 2 * slot)
    tile_k = gl.load(tiles_ptr + 2 * slot + 1)
    known = gl.maximum(document, 0)
    begin_q = gl.load(cu_q_ptr + known)
    length_q = gl.load(cu_q_ptr + known + 1) - begin_q
    begin_k = gl.load(cu_k_ptr + known)
    length_k = gl.load(cu_k_ptr + known + 1) - begin_k
    nth = tile_k * HEADS_KV + program % HEADS_KV
    tiles = gl.maximum((length_k + BLOCK_N - 1) // BLOCK_N, 1)
    first = nth % tiles * BLOCK_N
    return KeySlot(nth // tiles, document, first, begin_q, length_q, begin_k, length_k)


@gluon.jit
def next_block(head, block, head_kv, GROUP: gl.constexpr):
    """Returns the (query head, block of queries) that follows `head` and `block`.

    All heads of a block come first, then the block before it. In this order, programs that start
    together visit the same blocks at the same time.
    """
    head += 1
    end = (head_kv + 1) * GROUP
    block = gl.where(head == end, block - 1, block)
    head = gl.where(head == end, head_kv * GROUP, head)
    return head, block


@gluon.jit
def allocate_query_bars(STAGES: gl.constexpr):
    """Allocates the mbarriers q_ready and dout_ready, one of each per pipeline stage."""
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    q_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    dout_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_ready.index(i), count=1)
        mbarrier.init(dout_ready.index(i), count=1)
    return q_ready, dout_ready


@gluon.jit
def allocate_partial_dq(BLOCK_M: gl.constexpr, COLUMNS: gl.constexpr):
    """Allocates two float32 buffers of partial dq, one per consumer warpgroup."""
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, COLUMNS], gl.float32)
    return gl.allocate_shared_memory(gl.float32, [2, BLOCK_M, COLUMNS], layout)


@gluon.jit
def load_rows(desc, buffers, first, ready, rows):
    """Starts the TMA loads of both halves of a tile of keys or values.

    The caller sets the number of bytes that the mbarrier expects.

    Args:
        desc: TMA descriptor of a tensor [T, H, D], in blocks of a buffer's shape.
        buffers: Shared memory [.., rows, columns].
        first: Index of the buffer of the first half; the second half goes to the next buffer.
        ready: mbarrier that the loads complete.
        rows: Rows to load.
    """
    dtype: gl.constexpr = desc.dtype
    ROWS: gl.constexpr = buffers.shape[1]
    COLUMNS: gl.constexpr = buffers.shape[2]
    for i in gl.static_range(2):
        tma_load(
            desc,
            [RAGGED, rows.end, rows.row + i * ROWS, rows.head, 0],
            ready,
            reinterpret(buffers.index(first + i), dtype, [1, 1, ROWS, 1, COLUMNS], desc.layout),
        )


@gluon.jit
def keys_weights(
    s,
    lse,
    query,
    bounds,
    multiplier,
    BLOCK_M: gl.constexpr,
    s_layout: gl.constexpr,
    FLAGS: gl.constexpr,
):
    """Returns p [keys, queries] from the scores and the base-2 lse of a block of queries.

    Args:
        s: Scores k q^T, [keys, queries], in s_layout.
        lse: Base-2 log-sum-exp of the queries, [queries].
        query: Position of the block's first query.
        bounds: KeyBounds of the tile.
        multiplier: Factor of s in the base-2 exponent.
        BLOCK_M: Number of queries of the block.
        s_layout: Layout of s.
        FLAGS: Features beyond plain attention, a tile.structures.Flags.
    """
    HALF: gl.constexpr = s.shape[0]
    # Keys beyond the document's end are zero, so 2^(0 - lse) may overflow.
    masked = bounds.keys_here < HALF
    if FLAGS.has_right:
        masked = masked | (query + bounds.reach < HALF - 1)
    if FLAGS.has_left:
        masked = masked | (query + BLOCK_M - 1 + bounds.past > 0)
    if masked:
        local_key = gl.arange(0, HALF, gl.SliceLayout(1, s_layout))
        local_query = gl.arange(0, BLOCK_M, gl.SliceLayout(0, s_layout))
        # Bits 1 and 2 of a column differ between threads; the other bits are constants.
        column = (local_query & ~6)[None, :]
        ahead = local_key[:, None] - (local_query & 6)[None, :] - query
        known = (local_key < bounds.keys_here)[:, None]
        if FLAGS.has_right:
            s = gl.where(gl.where(known, ahead - bounds.reach, BLOCK_M) <= column, s, float("-inf"))
        else:
            s = gl.where(known, s, float("-inf"))
        if FLAGS.has_left:
            s = gl.where(ahead - bounds.past >= column, s, float("-inf"))
    return gl.exp2(s * multiplier - lse[None, :])


@gluon.jit
def key_offsets(
    keys,
    stride_t,
    stride_h,
    WIDTH: gl.constexpr,
    layout: gl.constexpr,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
):
    """Returns the offsets, in elements, and the mask with which a warpgroup stores dk or dv.

    Args:
        keys: OutputKeys of the warpgroup.
        stride_t: Stride of tokens, in elements.
        stride_h: Stride of heads, in elements.
        WIDTH: Columns of dk or dv; columns of the tile from WIDTH on are padding.
        layout: Register layout of the rows.
        ROWS: Number of keys.
        COLUMNS: Columns of the tile, with padding.
    """
    key = keys.first + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    column = gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))
    offset = (keys.begin + key).to(gl.int64) * stride_t + keys.head * stride_h
    inside = (key < keys.end)[:, None] & (column < WIDTH)[None, :]
    return offset[:, None] + column[None, :], inside


@gluon.jit
def start_dq(
    ds_bufs,
    k_bufs,
    buffer,
    zero_q,
    opaque_false,
    HALF_INDEX: gl.constexpr,
    TRANSPOSED: gl.constexpr,
):
    """Issues the products of half of the columns of partial dq, over both halves of the keys.

    With TRANSPOSED the result is [columns, queries], and store_partial_dq has no bank conflicts.
    """
    token = zero_q
    COLUMNS: gl.constexpr = zero_q.shape[0] if TRANSPOSED else zero_q.shape[1]
    for half in gl.static_range(2):
        ds = ds_bufs.index(buffer * 2 + half)
        k = rematerialised(k_bufs, half, opaque_false).slice(HALF_INDEX * COLUMNS, COLUMNS, dim=1)
        if TRANSPOSED:
            token = warpgroup_mma(k.permute((1, 0)), ds, token, use_acc=half > 0, is_async=True)
        else:
            token = warpgroup_mma(ds.permute((1, 0)), k, token, use_acc=half > 0, is_async=True)
    return token


@gluon.jit
def store_partial_dq(dq, dq_bufs, step, HALF_INDEX: gl.constexpr, TRANSPOSED: gl.constexpr):
    """Stores this warpgroup's partial dq of a step to shared memory, for the dQ warp."""
    barrier_wait(DQ_EMPTY + HALF_INDEX, DQ_WARP_AND_CONSUMER, 4, gl.where(step > 0, 1, 0))
    if TRANSPOSED:
        dq_bufs.index(HALF_INDEX).permute((1, 0)).store(dq)
    else:
        dq_bufs.index(HALF_INDEX).store(dq)
    fence_async_shared()
    barrier_arrive(DQ_READY + HALF_INDEX, DQ_WARP_AND_CONSUMER, 4)


@gluon.jit
def drain_partial_dq(steps, HALF_INDEX: gl.constexpr):
    """Waits until the dQ warp has read the last partial dq."""
    barrier_wait(DQ_EMPTY + HALF_INDEX, DQ_WARP_AND_CONSUMER, 4, gl.where(steps > 0, 1, 0))


@gluon.jit
def acquire_partial_dq(dq_bufs, INDEX: gl.constexpr, dq_desc):
    """Waits, in the dQ warp, until a buffer holds partial dq.

    Returns:
        The buffer, in the shape of a block of dq_desc.
    """
    barrier_wait(DQ_READY + INDEX, DQ_WARP_AND_CONSUMER, 1)
    BLOCK_M: gl.constexpr = dq_bufs.shape[1]
    COLUMNS: gl.constexpr = dq_bufs.shape[2]
    return reinterpret(
        dq_bufs.index(INDEX), gl.float32, [1, 1, BLOCK_M, 1, COLUMNS], dq_desc.layout
    )


@gluon.jit
def release_partial_dq():
    """Releases both buffers of partial dq, each as soon as the dQ warp's copy has read it."""
    tma_store_wait(1)
    barrier_arrive(DQ_EMPTY, DQ_WARP_AND_CONSUMER, 1)
    tma_store_wait(0)
    barrier_arrive(DQ_EMPTY + 1, DQ_WARP_AND_CONSUMER, 1)
