"""dq of the Hopper backward of varlen attention: who adds when and how, and who rounds."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from lctrain_kernels.gluon.compat import partition_barrier, tma_add, tma_store
from lctrain_kernels.gluon.step import add_four, query_blocks, release, wait_written
from lctrain_kernels.gluon.tile_keys import give_back_dq, take_dq

_RAGGED = gl.constexpr(1 << 30)
_TOLD_AT_ONCE = gl.constexpr(4)  # steps


@gluon.jit
def _earlier_tiles(block, tile, window, SHAPE: gl.constexpr):
    """How many tiles of keys before this one see a block of queries."""
    _, _, length_q, _, length_k, first, _, _ = tile
    left, _ = window
    BLOCK_M: gl.constexpr = SHAPE[0]
    BLOCK_N: gl.constexpr = SHAPE[1]
    seen = gl.maximum(block * BLOCK_M + length_k - length_q - left, 0)
    return first // BLOCK_N - seen // BLOCK_N


@gluon.jit
def _turn(turns, tile, step, GROUP: gl.constexpr, BLOCK_M: gl.constexpr):
    """Where the shares of a step's block of dq are counted. Two documents share no number."""
    turns_ptr, turns_per_head, document = turns
    head_kv, begin_q, _, _, _, _, _, high = tile
    head = head_kv * GROUP + step % GROUP
    block = high - 1 - step // GROUP
    return turns_ptr + head * turns_per_head + begin_q // BLOCK_M + document + block


@gluon.jit
def _tell(turns, tile, begin, end, GROUP: gl.constexpr, BLOCK_M: gl.constexpr):
    """Counts the shares of steps [begin, end), which this warp knows to be written."""
    partition_barrier()
    release()
    for step in range(begin, end):
        gl.atomic_add(_turn(turns, tile, step, GROUP, BLOCK_M), 1, sem="relaxed")


@gluon.jit
def _await_shares(turn, count):
    """Waits until `count` shares of a block of dq are in global memory."""
    there = gl.atomic_add(turn, 0, sem="acquire")
    while there < count:
        there = gl.atomic_add(turn, 0, sem="acquire")


@gluon.jit
def add_dq(
    dq_desc,
    dq_bufs,
    turns,
    tile,
    window,
    GROUP: gl.constexpr,
    SHAPE: gl.constexpr,
    DETERMINISTIC: gl.constexpr,
):
    """Adds the halves of dq that the warpgroups leave in shared memory to the float32 buffer.

    The first tile of keys that sees a block of queries stores its share, and the others add to it,
    in the order of their keys if DETERMINISTIC. turns counts the shares of a block that have
    reached global memory.
    """
    head_kv, begin_q, length_q, _, _, _, low, high = tile
    BLOCK_M: gl.constexpr = SHAPE[0]
    COLUMNS: gl.constexpr = SHAPE[2] // 2
    steps = GROUP * (high - low)
    there = 0
    told = 0
    is_first = steps < 0  # no: nothing came before
    for step in range(steps):
        block = high - 1 - step // GROUP
        head = head_kv * GROUP + step % GROUP
        was_first = is_first
        earlier = _earlier_tiles(block, tile, window, SHAPE)
        is_first = earlier == 0
        awaited = earlier
        if not DETERMINISTIC:
            awaited = gl.minimum(earlier, 1)
        if there < awaited:
            _await_shares(_turn(turns, tile, step, GROUP, BLOCK_M), awaited)
        row = _RAGGED - length_q + block * BLOCK_M
        for half in gl.static_range(2):
            place = [_RAGGED, begin_q + length_q, row, head, half * COLUMNS]
            share = take_dq(dq_bufs, half, dq_desc)
            if is_first:
                tma_store(dq_desc, place, share)
            else:
                tma_add(dq_desc, place, share)
        # Looked at ahead, so that nothing waits for the answer. Nothing acquires it either: a store
        # that was counted, and what the copy engine adds to it from now on, meet in L2, one after
        # the other. All lanes load one address at once, and so see one number.
        following = gl.minimum(step + 1, steps - 1)
        there = gl.load(_turn(turns, tile, following, GROUP, BLOCK_M), volatile=True)
        give_back_dq()
        # The shares of the steps before have arrived meanwhile, this one's has not. To tell others
        # costs as much as half a step, so it is done at once only where they wait for it.
        if DETERMINISTIC or was_first or step % _TOLD_AT_ONCE == 0:
            wait_written(2)
            _tell(turns, tile, told, step, GROUP, BLOCK_M)
            told = step
    wait_written(0)
    _tell(turns, tile, told, steps, GROUP, BLOCK_M)


@gluon.jit
def first_slab(
    sum_ptr,
    slabs_per_head,
    tile,
    document,
    GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_M: gl.constexpr,
):
    """Where reduce_dq begins, for the tile's first head and block of queries.

    The buffer is [heads, slabs, D / 8, 32, 4] float32. A slab is 16 queries of one document; blocks
    of two documents share none. Eight columns of it are what a warp has of them: in each thread two
    columns of two rows.
    """
    head_kv, begin_q, _, _, _, _, _, high = tile
    slab = (head_kv * GROUP).to(gl.int64) * slabs_per_head
    slab += begin_q // 16 + document + (high - 1) * (BLOCK_M // 16)
    return sum_ptr + slab * (16 * HEAD_DIM)


@gluon.jit
def reduce_dq(dq, dq_ptr, rows, HALF_INDEX: gl.constexpr, HEAD_DIM: gl.constexpr):
    """Adds a warpgroup's columns of a block of dq to the float32 buffer, out of its registers.

    An instruction of a warp adds to 512 bytes without gaps.

    Args:
        dq: [BLOCK_M, COLUMNS], half of the columns.
        dq_ptr: The block's first slab, as in first_slab.
        rows: Of the document, from the block's first on.
        HALF_INDEX: Which half.
        HEAD_DIM: Columns beyond are padding.
    """
    EIGHTS: gl.constexpr = dq.shape[1] // 8
    fours: gl.constexpr = gl.BlockedLayout(
        [1, EIGHTS, 2, 2], [32, 1, 1, 1], [4, 1, 1, 1], [3, 2, 1, 0]
    )
    layout: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, fours))
    # Row 16 * warp + 8 * below + lane // 4, column 8 * eight + 2 * (lane % 4) + odd: threads first,
    # then what each of them has. Nothing moves.
    parts = gl.reshape(dq, [4, 2, 8, EIGHTS, 4, 2])
    parts = gl.reshape(gl.permute(parts, (0, 2, 4, 3, 1, 5)), [128, EIGHTS, 2, 2])
    even, odd = gl.split(gl.convert_layout(parts, fours, assert_trivial=True))
    x0, x2 = gl.split(even)
    x1, x3 = gl.split(odd)
    thread = gl.arange(0, 128, gl.SliceLayout(1, layout))
    eight = HALF_INDEX * EIGHTS + gl.arange(0, EIGHTS, gl.SliceLayout(0, layout))
    to = dq_ptr + (thread // 32 * (16 * HEAD_DIM) + thread % 32 * 4)
    to = to[:, None] + (eight * 128)[None, :]
    left = gl.where((eight * 8 < HEAD_DIM)[None, :], (rows - thread // 32 * 16)[:, None], 0)
    add_four(to, left, x0, x1, x2, x3)


@gluon.jit
def finish_dq(
    dq,
    turns,
    tile,
    window,
    scale,
    GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    SHAPE: gl.constexpr,
    FLAGS: gl.constexpr,
):
    """Scales and rounds the blocks of dq that no later tile of keys sees."""
    sum_ptr, dq_ptr, stride_t, stride_h = dq
    head_kv, begin_q, length_q, _, length_k, first, low, high = tile
    left, right = window
    BLOCK_M: gl.constexpr = SHAPE[0]
    BLOCK_N: gl.constexpr = SHAPE[1]
    BLOCK_D: gl.constexpr = SHAPE[2]
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [128 // BLOCK_D, BLOCK_D // 4], [4, 1], [1, 0])
    end = high
    if first + BLOCK_N < length_k:
        end, _ = query_blocks(
            first + BLOCK_N,
            BLOCK_N,
            length_k - length_q,
            length_q,
            left,
            right,
            FLAGS[0],
            FLAGS[1],
            BLOCK_M,
        )
        end = gl.minimum(end, high)
    row = gl.arange(0, BLOCK_M, gl.SliceLayout(1, layout))
    column = gl.arange(0, BLOCK_D, gl.SliceLayout(0, layout))
    for item in range(GROUP * (end - low)):
        head = head_kv * GROUP + item % GROUP
        block = end - 1 - item // GROUP
        turn = _turn(turns, tile, (high - end) * GROUP + item, GROUP, BLOCK_M)
        _await_shares(turn, _earlier_tiles(block, tile, window, SHAPE) + 1)
        query = block * BLOCK_M + row
        place = (begin_q + query).to(gl.int64) * stride_t + head * stride_h
        place = place[:, None] + column[None, :]
        inside = (query < length_q)[:, None] & (column < HEAD_DIM)[None, :]
        # Not through L1, which does not know of the additions.
        whole = gl.load(sum_ptr + place, mask=inside, other=0.0, cache_modifier=".cg")
        gl.store(dq_ptr + place, (whole * scale).to(dq_ptr.dtype.element_ty), mask=inside)
