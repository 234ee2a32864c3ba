"""Device helpers that the Hopper backward kernels share.

They find a program's tile of keys, load it by TMA, recompute its attention weights, and pass
partial dq from the consumer warpgroups to the dQ warp. Partial dq is the dq of one block of queries
from one tile of keys.
"""

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
from lctrain_kernels.gluon.structures import KeySlot, Visit


@gluon.jit
def read_slot(cu_q_ptr, cu_k_ptr, tiles_ptr, HEADS_KV: gl.constexpr, BLOCK_N: gl.constexpr):
    """Returns the KeySlot of this program: its tile of keys, document and key/value head.

    The tiles of a document have adjacent programs, head after head, because they share queries in
    L2. The grid has one dimension, because the second and third dimension are limited to 65,535. An
    empty slot of the schedule has document -1 and the lengths of document 0.

    Args:
        cu_q_ptr: Cumulative query lengths, [N + 1] int32.
        cu_k_ptr: Cumulative key lengths, [N + 1] int32.
        tiles_ptr: Tile schedule of keys, [n, 2] int32: document and index of the tile in it.
        HEADS_KV: Number of key/value heads.
        BLOCK_N: Number of keys of a tile.
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
    """Returns the (query head, block of queries) of the next step of a program's loop.

    The loop visits all query heads of a block of queries, and then the block before it. In this
    order, programs that start together visit the same blocks at the same time.

    Args:
        head: Index of this step's query head.
        block: Index of this step's block of queries in the document.
        head_kv: Index of the program's key/value head.
        GROUP: Number of query heads per key/value head.
    """
    head += 1
    end = (head_kv + 1) * GROUP
    block = gl.where(head == end, block - 1, block)
    head = gl.where(head == end, head_kv * GROUP, head)
    return head, block


@gluon.jit
def first_visit(tile, BY_HEAD: gl.constexpr):
    """Returns the Visit of the first step of a tile of keys.

    Args:
        tile: Tile of keys, a KeyTile.
        BY_HEAD: Order of the steps, as in next_visit.
    """
    block = gl.maximum(tile.low, 0) if BY_HEAD else tile.high - 1
    return Visit(block * 0, block)


@gluon.jit
def next_visit(visit, tile, GROUP: gl.constexpr, BY_HEAD: gl.constexpr):
    """Returns the Visit of the following step.

    Args:
        visit: Visit of a step.
        tile: Tile of keys, a KeyTile.
        GROUP: Number of query heads per key/value head.
        BY_HEAD: Whether all blocks of a head come first, upwards. Otherwise all heads of a block
            come first, then the block before it, as in next_block.
    """
    member = visit.member
    block = visit.block
    if BY_HEAD:
        last = block == tile.high - 1
        block = gl.where(last, tile.low, block + 1)
        member = gl.where(last, member + 1, member)
    elif GROUP == 1:
        block = block - 1
    else:
        last = member == GROUP - 1
        block = gl.where(last, block - 1, block)
        member = gl.where(last, 0, member + 1)
    return Visit(member, block)


@gluon.jit
def allocate_query_bars(STAGES: gl.constexpr):
    """Allocates the mbarriers q_ready and dout_ready, one of each per stage of STAGES.

    Loads of a block of queries complete q_ready of their stage, loads of dout complete dout_ready.
    """
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    q_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    dout_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_ready.index(i), count=1)
        mbarrier.init(dout_ready.index(i), count=1)
    return q_ready, dout_ready


@gluon.jit
def allocate_partial_dq(BLOCK_M: gl.constexpr, COLUMNS: gl.constexpr):
    """Allocates the two shared-memory buffers that pass partial dq to the dQ warp.

    The result is [2, BLOCK_M, COLUMNS] float32. Each of the two consumer warpgroups writes one
    buffer, which holds half of the columns of dq.
    """
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, COLUMNS], gl.float32)
    return gl.allocate_shared_memory(gl.float32, [2, BLOCK_M, COLUMNS], layout)


@gluon.jit
def load_rows(desc, buffers, first, ready, rows, PARTS: gl.constexpr = 2):
    """Starts the TMA loads of a program's tile of keys or values, in parts of 64 rows.

    The caller sets the number of bytes that the mbarrier expects.

    Args:
        desc: TMA descriptor of a tensor [T, H, D], in blocks of a buffer's shape.
        buffers: Shared memory [n, 64, columns], with a part of the tile's rows in each buffer.
        first: Index of the buffer of the first part; the second part goes to the next buffer.
        ready: mbarrier that the loads complete.
        rows: Coordinates of the tile's rows, a Rows.
        PARTS: Number of parts, 1 or 2.
    """
    dtype: gl.constexpr = desc.dtype
    ROWS: gl.constexpr = buffers.shape[1]
    COLUMNS: gl.constexpr = buffers.shape[2]
    for i in gl.static_range(PARTS):
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
    """Recomputes the attention weights p [keys, queries] = 2^(s * multiplier - lse), masked.

    The tile is transposed: rows are a warpgroup's keys, and columns are a block of queries.

    Args:
        s: Scores k q^T, [keys, queries] float32, in s_layout.
        lse: Base-2 log-sum-exp of the queries, [queries] float32.
        query: Position of the block's first query.
        bounds: Window and document end relative to the warpgroup's first key, a KeyBounds.
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
    """Returns the offsets, in elements, and the mask with which a warpgroup stores its dk or dv.

    Both are [ROWS, COLUMNS]. The mask excludes keys beyond the document's end and padding columns.

    Args:
        keys: Coordinates of the warpgroup's keys, an OutputKeys.
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
    """Issues a warpgroup's asynchronous products of partial dq = dS^T k, without waiting for them.

    A warpgroup computes half of the columns of dq, from all keys of the tile. It reads its own dS
    and that of the other warpgroup from shared memory.

    Args:
        ds_bufs: dS in shared memory, [4, keys, queries]: two buffers per step parity, one per
            warpgroup.
        k_bufs: Two halves of the tile's keys in shared memory, [2, keys, columns].
        buffer: Index of the pair of dS buffers, 0 or 1.
        zero_q: Accumulator of zeros, in the result's shape.
        opaque_false: Condition that is always false, but that the compiler cannot evaluate.
        HALF_INDEX: Which half of the columns to compute, 0 or 1.
        TRANSPOSED: Whether the result is [columns, queries] instead of [queries, columns]; the
            store to shared memory then has no bank conflicts.
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
    """Stores a warpgroup's partial dq to shared memory, and signals the dQ warp.

    Before the store, the warpgroup waits until the dQ warp has read the partial dq of the last
    step.

    Args:
        dq: Partial dq in registers, as start_dq returns it, complete.
        dq_bufs: Buffers that allocate_partial_dq returned.
        step: Index of the step; the first one does not wait.
        HALF_INDEX: Index of the warpgroup and of its half of the columns, 0 or 1.
        TRANSPOSED: Whether dq is [columns, queries].
    """
    barrier_wait(DQ_EMPTY + HALF_INDEX, DQ_WARP_AND_CONSUMER, 4, gl.where(step > 0, 1, 0))
    if TRANSPOSED:
        dq_bufs.index(HALF_INDEX).permute((1, 0)).store(dq)
    else:
        dq_bufs.index(HALF_INDEX).store(dq)
    fence_async_shared()
    barrier_arrive(DQ_READY + HALF_INDEX, DQ_WARP_AND_CONSUMER, 4)


@gluon.jit
def drain_partial_dq(steps, HALF_INDEX: gl.constexpr):
    """Makes a consumer warpgroup wait until the dQ warp has read its last partial dq.

    HALF_INDEX is the warpgroup, and `steps` the number of partial dq that it handed over. With 0
    steps it does not wait.
    """
    barrier_wait(DQ_EMPTY + HALF_INDEX, DQ_WARP_AND_CONSUMER, 4, gl.where(steps > 0, 1, 0))


@gluon.jit
def acquire_partial_dq(dq_bufs, INDEX: gl.constexpr, dq_desc):
    """Makes the dQ warp wait until a warpgroup has stored its partial dq.

    Args:
        dq_bufs: Buffers that allocate_partial_dq returned.
        INDEX: Index of the warpgroup, 0 or 1.
        dq_desc: TMA descriptor of the float32 buffer to which the dQ warp adds.

    Returns:
        The warpgroup's buffer in shared memory, in the shape of a block of dq_desc.
    """
    barrier_wait(DQ_READY + INDEX, DQ_WARP_AND_CONSUMER, 1)
    BLOCK_M: gl.constexpr = dq_bufs.shape[1]
    COLUMNS: gl.constexpr = dq_bufs.shape[2]
    return reinterpret(
        dq_bufs.index(INDEX), gl.float32, [1, 1, BLOCK_M, 1, COLUMNS], dq_desc.layout
    )


@gluon.jit
def release_partial_dq():
    """Signals, from the dQ warp, that both buffers of partial dq may be overwritten.

    The signal for each buffer follows as soon as the TMA copy has read the buffer.
    """
    tma_store_wait(1)
    barrier_arrive(DQ_EMPTY, DQ_WARP_AND_CONSUMER, 1)
    tma_store_wait(0)
    barrier_arrive(DQ_EMPTY + 1, DQ_WARP_AND_CONSUMER, 1)
