"""Finds the tile, document and heads of a program."""

import triton
import triton.language as tl

from lctrain_kernels.schedule import SCHEDULE_ROWS

_SCHEDULE_ROWS = tl.constexpr(SCHEDULE_ROWS)


@triton.jit
def locate_program(tiles_ptr, num_tiles, POSITIONS: tl.constexpr, HEAD_GROUPS: tl.constexpr):
    """Returns the (key/value head, head group, document, first position) of this program.

    Programs of one key/value head have adjacent ids, so they share keys and values in L2. Within a
    head, programs follow the order of the tile schedule. A tile of SCHEDULE_ROWS rows is computed
    by SCHEDULE_ROWS / POSITIONS programs per head group.
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
    """Returns the index of a document's first token in the pack (int64), and its length."""
    begin = tl.load(cu_seqlens_ptr + document)
    end = tl.load(cu_seqlens_ptr + document + 1)
    return begin.to(tl.int64), end - begin
