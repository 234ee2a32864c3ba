"""Finds a program's tile, document and heads from its program id."""

import triton
import triton.language as tl

from lctrain_kernels.schedule import SCHEDULE_ROWS

_SCHEDULE_ROWS = tl.constexpr(SCHEDULE_ROWS)


@triton.jit
def locate_program(tiles_ptr, num_tiles, POSITIONS: tl.constexpr, HEAD_GROUPS: tl.constexpr):
    """Returns the (key/value head, head group, document, first position) of this program.

    The tile schedule lists tiles of 128 positions (SCHEDULE_ROWS) of all documents. A scheduled
    tile is computed by 128 / POSITIONS programs per head group. Programs of one key/value head have
    adjacent ids, so they share keys and values in L2. Document -1 is an empty slot of the schedule.

    Args:
        tiles_ptr: Tile schedule, [num_tiles, 2] int32: document and index of the tile in it.
        num_tiles: Number of scheduled tiles.
        POSITIONS: Number of positions of a program's tile.
        HEAD_GROUPS: Number of head groups per key/value head. The query heads of a head group share
            a program.
    """
    PARTS: tl.constexpr = _SCHEDULE_ROWS // POSITIONS
    pid = tl.program_id(0)
    per_head = num_tiles * PARTS * HEAD_GROUPS
    head_kv = pid // per_head
    rest = pid % per_head
    slot = rest // (PARTS * HEAD_GROUPS)
    part = PARTS - 1 - (rest % (PARTS * HEAD_GROUPS)) // HEAD_GROUPS
    head_group = rest % HEAD_GROUPS
    document = tl.load(tiles_ptr + 2 * slot)
    block = tl.load(tiles_ptr + 2 * slot + 1)
    return head_kv, head_group, document, block * _SCHEDULE_ROWS + part * POSITIONS


@triton.jit
def document_bounds(cu_seqlens_ptr, document):
    """Returns (index in the pack of a document's first token, int64; number of its tokens).

    Args:
        cu_seqlens_ptr: Cumulative lengths, [N + 1] int32.
        document: Index of the document in the pack.
    """
    begin = tl.load(cu_seqlens_ptr + document)
    end = tl.load(cu_seqlens_ptr + document + 1)
    return begin.to(tl.int64), end - begin
