"""The position of a program: its tile, its document, its heads."""

import triton
import triton.language as tl

from lctrain_kernels.schedule import SCHEDULE_ROWS

_SCHEDULE_ROWS = tl.constexpr(SCHEDULE_ROWS)


@triton.jit
def locate_program(tiles_ptr, num_tiles, POSITIONS: tl.constexpr, HEAD_GROUPS: tl.constexpr):
    """Returns (key/value head, head group, document, first position).

    The programs of one key/value head are neighbours, so that they share its keys and values in L2;
    among them tiles come longest first. A schedule entry of SCHEDULE_ROWS rows is served by
    SCHEDULE_ROWS / POSITIONS programs per head group.
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
    """Returns (first packed token as int64, length) of a document."""
    begin = tl.load(cu_seqlens_ptr + document)
    end = tl.load(cu_seqlens_ptr + document + 1)
    return begin.to(tl.int64), end - begin
