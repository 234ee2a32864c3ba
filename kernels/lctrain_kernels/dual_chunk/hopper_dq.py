"""Rotates and rounds the sum of partial dq, where the Hopper backward adds it from registers.

The sum is [heads, slabs, D / 8, 32, 4] float32. A slab holds 16 queries of one document, in the
order of registers: `first_slab` in varlen/hopper_bwd_dq.py describes it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lctrain_kernels.dual_chunk.operands import Rotation
from lctrain_kernels.dual_chunk.ranges import inter_delta, inter_end
from lctrain_kernels.dual_chunk.triton_rotate import ROTATE_CONFIG
from lctrain_kernels.gluon.config import SLAB_ROWS
from lctrain_kernels.launch import launch
from lctrain_kernels.pack import TiledPack
from lctrain_kernels.schedule import SCHEDULE_ROWS
from lctrain_kernels.tile.arguments import RUNTIME_INTEGERS, padded_head_dim
from lctrain_kernels.tile.rotary import (
    cos_sin,
    load_frequencies,
    pair_columns,
    rotate,
    store_pairs,
)
from lctrain_kernels.tile.seqlen import document_bounds, locate_program


@triton.jit
def _columns_of_slabs(slabs, SLABS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Returns slabs [SLABS, BLOCK_D * 16], as they lie in memory, as rows of columns.

    The result is [SLABS * 16, BLOCK_D], in the half-split layout of tile/rotary.py.
    """
    # Order of the numbers of eight columns: row % 8, column // 2, row // 8, column % 2.
    values = tl.reshape(slabs, (SLABS, BLOCK_D // 8, 8, 4, 2, 2))
    return tl.reshape(tl.permute(values, (0, 4, 2, 1, 3, 5)), (SLABS * 16, BLOCK_D))


@triton.jit
def _slabs_of_columns(rows, SLABS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Inverts _columns_of_slabs."""
    values = tl.reshape(rows, (SLABS, 2, 8, BLOCK_D // 8, 4, 2))
    return tl.reshape(tl.permute(values, (0, 3, 2, 4, 1, 5)), (SLABS, BLOCK_D * 16))


@triton.jit(do_not_specialize=[*RUNTIME_INTEGERS, "slabs_per_head"])
def dual_chunk_dq_slabs_kernel(
    sum_ptr,
    dq_ptr,
    cu_q_ptr,
    cu_k_ptr,
    tiles_ptr,
    inv_freq_ptr,
    logit_scale_ptr,
    num_tiles,
    slabs_per_head,
    chunk_length,
    succ_length,
    inter_position,
    scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Rotates a sum of partial dq in place, or writes dq = scale * sum in dq's dtype.

    Without dq_ptr, sums of tiles with INTER keys are rotated to the inter position, before the
    INTER launch of the backward. With dq_ptr, the kernel follows that launch, and rotates these
    sums back. Grid: that of dual_chunk_rotate_kernel, over tiles of queries.

    Args:
        sum_ptr: Sum of partial dq, [HEADS, slabs_per_head, HEAD_DIM / 8, 32, 4] float32.
        dq_ptr: Gradient of q to write, [T, HEADS, HEAD_DIM], contiguous; or None.
        cu_q_ptr: Cumulative query lengths, [N + 1] int32.
        cu_k_ptr: Cumulative key lengths, [N + 1] int32.
        tiles_ptr: Tiles of queries of a TileSchedule, [n, 2] int32.
        inv_freq_ptr: Inverse frequencies of RoPE, [D / 2] float32.
        logit_scale_ptr: Further factor of each document's scale, [N] float32, or None.
        num_tiles: Number of tiles.
        slabs_per_head: Number of slabs per head in the sum.
        chunk_length: Number of tokens of a chunk.
        succ_length: Number of SUCC queries at the start of a chunk.
        inter_position: Position to which INTER queries were rotated.
        scale: softmax_scale, the factor of q.k.
        HEADS: Number of query heads.
        HEAD_DIM: Head dim D, a multiple of 16.
        BLOCK_D: Smallest power of two >= D.
        BLOCK_M: Number of queries of a program, a multiple of 16.
    """
    SLABS: tl.constexpr = BLOCK_M // 16
    head, _, document, first = locate_program(tiles_ptr, num_tiles, BLOCK_M, 1)
    if document < 0:
        return
    begin, length = document_bounds(cu_q_ptr, document)
    _, length_k = document_bounds(cu_k_ptr, document)
    if first >= length:
        return
    last = tl.minimum(first + BLOCK_M, length) - 1 + length_k - length
    has_inter = inter_end(last, chunk_length, succ_length) > 0  # as in dual_chunk_rotate_kernel
    if dq_ptr is None and not has_inter:
        return
    item = tl.arange(0, 16 * BLOCK_D)
    # The two halves of the columns are apart by the padding of both.
    eight = item // 128
    known = eight % (BLOCK_D // 16) < HEAD_DIM // 16
    item = (
        eight // (BLOCK_D // 16) * (HEAD_DIM // 16) + eight % (BLOCK_D // 16)
    ) * 128 + item % 128
    in_document = tl.arange(0, SLABS) * 16 + first
    slab = head.to(tl.int64) * slabs_per_head + begin // 16 + document + in_document // 16
    slabs = sum_ptr + slab[:, None] * (16 * HEAD_DIM) + item[None, :]
    mask = (in_document < length)[:, None] & known[None, :]
    rows = _columns_of_slabs(tl.load(slabs, mask=mask, other=0.0), SLABS, BLOCK_D)
    query = first + tl.arange(0, BLOCK_M)
    if has_inter:
        turns, turns_rest = load_frequencies(inv_freq_ptr, HEAD_DIM, BLOCK_D)
        moved = inter_delta(query + length_k - length, chunk_length, inter_position)
        cos, sin = cos_sin(moved[:, None], turns[None, :], turns_rest[None, :])
        if dq_ptr is not None:
            sin = -sin
        rows = rotate(rows, cos, sin, BLOCK_M, BLOCK_D)
    if dq_ptr is None:
        tl.store(slabs, _slabs_of_columns(rows, SLABS, BLOCK_D), mask=mask)
    else:
        if logit_scale_ptr is not None:
            scale *= tl.load(logit_scale_ptr + document)
        pairs = pair_columns(HEAD_DIM, BLOCK_D)
        row = ((begin + query).to(tl.int64) * HEADS + head) * HEAD_DIM
        store_pairs(
            dq_ptr + (row[:, None] + pairs[None, :]), rows * scale, query, length, HEAD_DIM, BLOCK_D
        )


def zero_dq_slabs(q: Tensor, documents: int) -> Tensor:
    """Returns zeros for the sum of partial dq, [H, slabs, 16 * D] float32.

    Args:
        q: Queries [T, H, D].
        documents: Number of documents.
    """
    total_q, heads, head_dim = q.shape
    per_head = total_q // SLAB_ROWS + documents
    return torch.zeros(
        (heads, per_head, SLAB_ROWS * head_dim), dtype=torch.float32, device=q.device
    )


def finish_dq_slabs(
    dq_sum: Tensor,
    dq: Tensor | None,
    pack: TiledPack,
    rotation: Rotation,
    logit_scale: Tensor | None = None,
    softmax_scale: float = 1.0,
) -> None:
    """Launches dual_chunk_dq_slabs_kernel.

    Args:
        dq_sum: Sum of partial dq, as zero_dq_slabs returns it.
        dq: Gradient of q to write, [T, H, D], contiguous; None rotates dq_sum in place.
        pack: Boundaries and tile schedule.
        rotation: Rotation of the queries.
        logit_scale: Further factor of each document's scale, [N] float32, or None.
        softmax_scale: Factor of q.k.
    """
    heads, per_head, numbers = dq_sum.shape
    rows = ROTATE_CONFIG.block_m
    launch(dual_chunk_dq_slabs_kernel, (heads * pack.q_tiles.shape[0] * (SCHEDULE_ROWS // rows),))(
        dq_sum,
        dq,
        pack.cu_seqlens_q,
        pack.cu_seqlens_k,
        pack.q_tiles,
        rotation.inv_freq,
        logit_scale,
        pack.q_tiles.shape[0],
        per_head,
        rotation.chunk_length,
        rotation.succ_length,
        rotation.inter_position,
        softmax_scale,
        HEADS=heads,
        HEAD_DIM=numbers // SLAB_ROWS,
        BLOCK_D=padded_head_dim(numbers // SLAB_ROWS),
        BLOCK_M=rows,
        num_warps=4,
        enable_fp_fusion=True,
    )
