"""Launches the Hopper kernels of differential attention.

Two Triton kernels run before and after the backward kernel; they are defined here.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lctrain_kernels.differential.hopper_bwd import differential_bwd_hopper_kernel
from lctrain_kernels.differential.hopper_fwd import differential_fwd_hopper_kernel
from lctrain_kernels.differential.hopper_structures import (
    BackwardPointers,
    BackwardStrides,
    ForwardPointers,
    PreparePointers,
    PrepareStrides,
)
from lctrain_kernels.differential.hopper_support import backward_tile, forward_tile
from lctrain_kernels.gluon.config import (
    BLOCK_N_BACKWARD,
    CONSUMERS,
    REGISTERS,
    SLAB_ROWS,
    backward_shape,
    forward_shape,
    pack_heads,
)
from lctrain_kernels.gluon.launch import multiprocessors, padded_columns, ragged_descriptor
from lctrain_kernels.launch import cdiv, launch
from lctrain_kernels.options import AttentionOptions
from lctrain_kernels.pack import TiledPack
from lctrain_kernels.schedule import SCHEDULE_ROWS
from lctrain_kernels.tile.arguments import (
    dropout_arguments,
    dropout_tensors,
    token_head_strides,
    window_arguments,
)
from lctrain_kernels.tile.logits import LOG2_E
from lctrain_kernels.tile.structures import Flags
from lctrain_kernels.varlen.hopper import round_dq_slabs

_LOG2_E = tl.constexpr(LOG2_E)
PREPARE_ROWS = 64  # tokens of a program that prepares the backward or rounds its dq
_SMALLEST_LAM = tl.constexpr(2.0**-60)


def differential_fwd(
    q1: Tensor,
    q2: Tensor,
    k1: Tensor,
    k2: Tensor | None,
    v: Tensor,
    lam: Tensor,
    pack: TiledPack,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launches differential_fwd_hopper_kernel.

    Arguments and results are those of triton_fwd.differential_fwd. The function checks nothing: the
    registry calls it only for calls that the kernels support.
    """
    total_q, heads, head_dim = q1.shape
    heads_kv, value_dim = v.shape[1:]
    group = heads // heads_kv
    out = torch.empty((total_q, heads, value_dim), dtype=q1.dtype, device=q1.device)
    out1, out2 = torch.empty_like(out), torch.empty_like(out)
    lse1 = torch.empty((heads, total_q), dtype=torch.float32, device=q1.device)
    lse2 = torch.empty_like(lse1)
    heads_per_tile = pack_heads(group)
    columns, value_columns = padded_columns(head_dim), padded_columns(value_dim)
    tile = forward_tile(columns, value_columns, k2 is None)
    positions = CONSUMERS * 64 // heads_per_tile
    items = pack.q_tiles.shape[0] * (SCHEDULE_ROWS // positions) * (heads // heads_per_tile)
    if items == 0:
        return out, out1, out2, lse1, lse2
    run = min(64, positions)
    num_k = 1 if k2 is None else 2
    window_ptr, left, right, has_left, has_right = window_arguments(options)
    threshold, scale_kept, first_head = dropout_arguments(options)
    launch(differential_fwd_hopper_kernel, (min(items, multiprocessors(q1.device)),))(
        ragged_descriptor(q1, run, 64),
        ragged_descriptor(q2, run, 64),
        ragged_descriptor(k1, tile.block_n, columns),
        None if k2 is None else ragged_descriptor(k2, tile.block_n, columns),
        ragged_descriptor(v, tile.block_n, value_columns),
        ragged_descriptor(out, run, 64),
        ragged_descriptor(out1, run, 64),
        ragged_descriptor(out2, run, 64),
        ForwardPointers(
            lam,
            lse1,
            lse2,
            pack.cu_seqlens_q,
            pack.cu_seqlens_k,
            pack.q_tiles,
            torch.zeros(1, dtype=torch.int32, device=q1.device),
            window_ptr,
            *dropout_tensors(options, pack),
        ),
        *lam.stride(),
        items,
        total_q,
        left,
        right,
        options.softmax_scale,
        threshold,
        scale_kept,
        first_head,
        TILE=forward_shape(tile, columns, group, heads, heads_per_tile, value_columns, num_k),
        FLAGS=Flags(has_left=has_left, has_right=has_right, has_dropout=options.has_dropout),
        num_warps=4,
        maxnreg=REGISTERS,
        enable_fp_fusion=True,
    )
    return out, out1, out2, lse1, lse2


@triton.jit(do_not_specialize=["stride_lt", "stride_lh", "total_q"])
def differential_prepare_kernel(
    pointers: PreparePointers,
    strides: PrepareStrides,
    stride_lt,
    stride_lh,
    total_q,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Computes dlam and the statistics that the backward kernel reads; zeroes sums of dq.

    out = A1 v - lam A2 v, with the attention weights A_b of branch b. With D_b = rowsum(dout * A_b
    v), stats [4, H, T] float32 holds, per query and head:

    - base-2 lse1, +inf for a query that saw no key;
    - base-2 lse2 - log2 |lam|, with which the exponential for p2 gives |lam| p2;
    - e1 = D1 - dlse1;
    - e2 = D2 + dlse2 / lam, with the sign of lam in the last bit of the mantissa.

    |lam| is at least 2^-60 here. dlam = -D2 is [H, T] float32. Grid: (blocks of ROWS tokens,
    heads).

    Args:
        pointers: Pointers to the tensors, a PreparePointers.
        strides: Strides of out1, out2 and dout, a PrepareStrides.
        stride_lt: Stride of lam's tokens, in elements.
        stride_lh: Stride of lam's heads, in elements.
        total_q: Number of packed queries T.
        HEADS: Number of query heads.
        HEAD_DIM: Head dim D.
        BLOCK_D: Smallest power of two >= D.
        VALUE_DIM: Head dim Dv of the values.
        BLOCK_DV: Smallest power of two >= Dv.
        ROWS: Number of tokens of a program.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    value_column = tl.arange(0, BLOCK_DV)
    inside = row < total_q
    token = row.to(tl.int64)
    value_mask = inside[:, None] & (value_column < VALUE_DIM)[None, :]
    out_row = token * strides.out_token + head * strides.out_head
    out_offset = out_row[:, None] + value_column[None, :]
    dout_row = token * strides.dout_token + head * strides.dout_head
    dout_offset = dout_row[:, None] + value_column[None, :]
    dout = tl.load(pointers.dout + dout_offset, value_mask, 0.0).to(tl.float32)
    e1 = tl.sum(tl.load(pointers.out1 + out_offset, value_mask, 0.0).to(tl.float32) * dout, 1)
    e2 = tl.sum(tl.load(pointers.out2 + out_offset, value_mask, 0.0).to(tl.float32) * dout, 1)
    offset = head * total_q + token
    tl.store(pointers.dlam + offset, -e2, inside)
    lam = tl.load(pointers.lam + token * stride_lt + head * stride_lh, inside, 1.0)
    size = tl.maximum(tl.abs(lam), _SMALLEST_LAM)
    if pointers.dlse1 is not None:
        e1 -= tl.load(pointers.dlse1 + offset, inside, 0.0)
    if pointers.dlse2 is not None:
        dlse2 = tl.load(pointers.dlse2 + offset, inside, 0.0)
        e2 += tl.where(lam < 0, -dlse2, dlse2) / size
    bits = (e2.to(tl.int32, bitcast=True) & -2) | (lam < 0).to(tl.int32)
    lse1 = tl.load(pointers.lse1 + offset, inside, 0.0)
    lse2 = tl.load(pointers.lse2 + offset, inside, 0.0)
    # lse = +inf gives a query that saw no key weights of 2^(x - inf) = 0.
    lse1 = tl.where(lse1 == float("-inf"), float("inf"), lse1 * _LOG2_E)
    lse2 = tl.where(lse2 == float("-inf"), float("inf"), lse2 * _LOG2_E - tl.log2(size))
    stats = pointers.stats + offset
    width = HEADS * total_q.to(tl.int64)
    tl.store(stats, lse1, inside)
    tl.store(stats + width, lse2, inside)
    tl.store(stats + 2 * width, e1, inside)
    tl.store(stats + 3 * width, bits.to(tl.float32, bitcast=True), inside)
    if pointers.dq1 is not None:
        dq = (token * HEADS + head)[:, None] * HEAD_DIM + column[None, :]
        mask = inside[:, None] & (column < HEAD_DIM)[None, :]
        tl.store(pointers.dq1 + dq, tl.zeros([ROWS, BLOCK_D], tl.float32), mask)
        tl.store(pointers.dq2 + dq, tl.zeros([ROWS, BLOCK_D], tl.float32), mask)


@triton.jit(do_not_specialize=["total_q"])
def differential_round_dq_kernel(
    sum1_ptr,
    sum2_ptr,
    dq1_ptr,
    dq2_ptr,
    total_q,
    scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Writes dq = scale * sum in dq's dtype, for both branches, after the backward kernel.

    All tensors are [T, H, D] and contiguous. Grid: (blocks of ROWS tokens, heads).

    Args:
        sum1_ptr: Sum of the partial dq1, float32.
        sum2_ptr: Sum of the partial dq2, float32.
        dq1_ptr: Gradient of q1 to write.
        dq2_ptr: Gradient of q2 to write.
        total_q: Number of packed queries T.
        scale: softmax_scale, by which the sums are multiplied.
        HEADS: Number of query heads.
        HEAD_DIM: Head dim D.
        BLOCK_D: Smallest power of two >= D.
        ROWS: Number of tokens of a program.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    mask = (row < total_q)[:, None] & (column < HEAD_DIM)[None, :]
    offset = (row.to(tl.int64) * HEADS + tl.program_id(1))[:, None] * HEAD_DIM + column[None, :]
    dq1 = tl.load(sum1_ptr + offset, mask, 0.0) * scale
    dq2 = tl.load(sum2_ptr + offset, mask, 0.0) * scale
    tl.store(dq1_ptr + offset, dq1.to(dq1_ptr.dtype.element_ty), mask)
    tl.store(dq2_ptr + offset, dq2.to(dq2_ptr.dtype.element_ty), mask)


def differential_bwd(
    dout: Tensor,
    dlse1: Tensor | None,
    dlse2: Tensor | None,
    q1: Tensor,
    q2: Tensor,
    k1: Tensor,
    k2: Tensor | None,
    v: Tensor,
    lam: Tensor,
    out1: Tensor,
    out2: Tensor,
    lse1: Tensor,
    lse2: Tensor,
    pack: TiledPack,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launches the Hopper backward, which has no dropout.

    Arguments and results are those of triton_bwd.differential_bwd. Programs add partial dq1 and dq2
    in float32 in an order that depends on timing, so the last bits of dq1 and dq2 differ from run
    to run. The other gradients have the same bits in every run.
    """
    total_q, heads, head_dim = q1.shape
    heads_kv, value_dim = v.shape[1:]
    device = q1.device
    dout = dout if dout.stride(2) == 1 else dout.contiguous()
    dlse1 = None if dlse1 is None else dlse1.contiguous()
    dlse2 = None if dlse2 is None else dlse2.contiguous()
    dq1 = torch.empty(q1.shape, dtype=q1.dtype, device=device)
    dq2 = torch.empty_like(dq1)
    dk1 = torch.empty(k1.shape, dtype=k1.dtype, device=device)
    dk2 = torch.empty(0 if k2 is None else k2.shape, dtype=k1.dtype, device=device)
    dv = torch.empty(v.shape, dtype=v.dtype, device=device)
    dlam = torch.empty((heads, total_q), dtype=torch.float32, device=device)
    if total_q == 0:
        return dq1, dq2, dk1.zero_(), dk2.zero_(), dv.zero_(), dlam
    stats = torch.empty((4, heads, total_q), dtype=torch.float32, device=device)
    columns, value_columns = padded_columns(head_dim), padded_columns(value_dim)
    documents = pack.cu_seqlens_q.shape[0] - 1
    tile = backward_tile(columns, value_columns, k2 is None, total_q, documents)
    from_registers = tile.reduce_from_registers
    per_head = total_q // SLAB_ROWS + documents
    if from_registers:
        slabs = (2, heads, per_head, SLAB_ROWS * head_dim)
        sums = torch.zeros(slabs, dtype=torch.float32, device=device)
    else:
        sums = torch.empty((2, total_q, heads, head_dim), dtype=torch.float32, device=device)
    zero1, zero2 = (None, None) if from_registers else (sums[0], sums[1])
    launch(differential_prepare_kernel, (cdiv(total_q, PREPARE_ROWS), heads))(
        PreparePointers(out1, out2, dout, lam, lse1, lse2, dlse1, dlse2, zero1, zero2, dlam, stats),
        PrepareStrides(*token_head_strides(out1, dout)),
        *lam.stride(),
        total_q,
        HEADS=heads,
        HEAD_DIM=head_dim,
        BLOCK_D=columns,
        VALUE_DIM=value_dim,
        BLOCK_DV=value_columns,
        ROWS=PREPARE_ROWS,
        num_warps=8,
        enable_fp_fusion=True,
    )
    window_ptr, left, right, has_left, has_right = window_arguments(options)
    launch(differential_bwd_hopper_kernel, (heads_kv * pack.k_tiles.shape[0],))(
        ragged_descriptor(q1, tile.block_m, columns),
        ragged_descriptor(q2, tile.block_m, columns),
        ragged_descriptor(dout, tile.block_m, value_columns),
        ragged_descriptor(k1, BLOCK_N_BACKWARD // 2, columns),
        None if k2 is None else ragged_descriptor(k2, BLOCK_N_BACKWARD // 2, columns),
        ragged_descriptor(v, BLOCK_N_BACKWARD // 2, value_columns),
        *(None if x is None else ragged_descriptor(x, tile.block_m, 64) for x in (zero1, zero2)),
        BackwardPointers(
            stats,
            dk1,
            None if k2 is None else dk2,
            dv,
            sums if from_registers else None,
            pack.cu_seqlens_q,
            pack.cu_seqlens_k,
            pack.k_tiles,
            window_ptr,
        ),
        per_head,
        BackwardStrides(*token_head_strides(dk1, dv)),
        total_q,
        left,
        right,
        options.softmax_scale,
        TILE=backward_shape(
            tile,
            columns,
            heads // heads_kv,
            heads_kv,
            head_dim,
            value_dim=value_dim,
            value_columns=value_columns,
            num_k=1 if k2 is None else 2,
        ),
        FLAGS=Flags(has_left=has_left, has_right=has_right),
        num_warps=4,
        maxnreg=REGISTERS,
        enable_fp_fusion=True,
    )
    if from_registers:
        for total, dq in zip(sums, (dq1, dq2), strict=True):
            round_dq_slabs(total, dq, pack, options.softmax_scale)
        return dq1, dq2, dk1, dk2, dv, dlam
    launch(differential_round_dq_kernel, (cdiv(total_q, PREPARE_ROWS), heads))(
        sums[0],
        sums[1],
        dq1,
        dq2,
        total_q,
        options.softmax_scale,
        HEADS=heads,
        HEAD_DIM=head_dim,
        BLOCK_D=columns,
        ROWS=PREPARE_ROWS,
        num_warps=8,
        enable_fp_fusion=True,
    )
    return dq1, dq2, dk1, dk2, dv, dlam
