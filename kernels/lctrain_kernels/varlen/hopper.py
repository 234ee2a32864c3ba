"""Launches the Hopper kernels of varlen attention.

Two Triton kernels run before and after the backward kernel; they are defined here.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lctrain_kernels.gluon.config import (
    BLOCK_N_BACKWARD,
    REGISTERS,
    SLAB_ROWS,
    backward_shape,
    entry_registers,
    forward_shape,
    forward_tile,
    is_persistent,
    pack_heads,
    slab_rows,
    tile_of_call,
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
from lctrain_kernels.varlen.hopper_bwd import (
    BackwardPointers,
    BackwardStrides,
    varlen_bwd_hopper_kernel,
)
from lctrain_kernels.varlen.hopper_bwd_persistent import varlen_bwd_persistent_hopper_kernel
from lctrain_kernels.varlen.hopper_bwd_wide import varlen_bwd_wide_hopper_kernel
from lctrain_kernels.varlen.hopper_fwd import ForwardPointers, varlen_fwd_hopper_kernel

_LOG2_E = tl.constexpr(LOG2_E)
PREPARE_ROWS = 64  # tokens of a program that prepares the backward or rounds its dq


def varlen_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pack: TiledPack,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor]:
    """Launches varlen_fwd_hopper_kernel and returns out [T, H, D] and lse [H, T] float32.

    Arguments and results are those of varlen.triton_fwd.varlen_fwd. The function checks nothing:
    the registry calls it only for calls that the kernels support.
    """
    total_q, heads, head_dim = q.shape
    group = heads // k.shape[1]
    out = torch.empty((total_q, heads, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, total_q), dtype=torch.float32, device=q.device)
    heads_per_tile = pack_heads(group)
    columns = padded_columns(head_dim)
    tile = forward_tile(columns, heads_per_tile, options.has_dropout)
    positions = tile.consumers * 64 // heads_per_tile
    items = pack.q_tiles.shape[0] * cdiv(SCHEDULE_ROWS, positions) * (heads // heads_per_tile)
    if items == 0:
        return out, lse
    run = min(64, positions)
    window_ptr, left, right, has_left, has_right = window_arguments(options)
    threshold, scale_kept, first_head = dropout_arguments(options)
    launch(varlen_fwd_hopper_kernel, (min(items, multiprocessors(q.device)),))(
        ragged_descriptor(q, run, 64),
        ragged_descriptor(k, tile.block_n, columns),
        ragged_descriptor(v, tile.block_n, columns),
        ragged_descriptor(out, run, 64),
        ForwardPointers(
            lse,
            pack.cu_seqlens_q,
            pack.cu_seqlens_k,
            pack.q_tiles,
            torch.zeros(1, dtype=torch.int32, device=q.device),
            window_ptr,
            options.learnable_sink,
            *dropout_tensors(options, pack),
        ),
        items,
        total_q,
        left,
        right,
        options.softmax_scale,
        options.softcap,
        threshold,
        scale_kept,
        first_head,
        TILE=forward_shape(tile, columns, group, heads, heads_per_tile),
        FLAGS=Flags(
            has_left=has_left,
            has_right=has_right,
            has_softcap=options.softcap > 0,
            has_sink=options.learnable_sink is not None,
            has_dropout=options.has_dropout,
        ),
        num_warps=4,
        maxnreg=entry_registers(tile.consumers),
        enable_fp_fusion=True,
    )
    return out, lse


@triton.jit(do_not_specialize=["total_q"])
def varlen_prepare_kernel(
    out_ptr,
    dout_ptr,
    lse_ptr,
    dlse_ptr,
    dq_ptr,
    delta_ptr,
    lse2_ptr,
    kept_delta_ptr,
    stride_ot,
    stride_oh,
    stride_dot,
    stride_doh,
    total_q,
    keep_scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Computes delta = rowsum(dout * out) - dlse and the base-2 lse, before the backward kernel.

    Grid: (blocks of ROWS tokens, heads).

    Args:
        out_ptr: Output of the forward, [T, HEADS, D].
        dout_ptr: Gradient of out, [T, HEADS, D].
        lse_ptr: Log-sum-exp, natural logarithm, [HEADS, T] float32.
        dlse_ptr: Gradient of lse, [HEADS, T] float32, or None.
        dq_ptr: If given, dq [T, HEADS, D] is set to 0 for queries whose out is 0. They include all
            queries that see no key, for which the backward kernel writes no dq.
        delta_ptr: delta, [HEADS, T] float32; written.
        lse2_ptr: Base-2 log-sum-exp, [HEADS, T] float32, +inf for a query that saw no key; written.
        kept_delta_ptr: delta / keep_scale, [HEADS, T] float32, written; None without dropout.
        stride_ot: Stride of out's tokens, in elements.
        stride_oh: Stride of out's heads, in elements.
        stride_dot: Stride of dout's tokens, in elements.
        stride_doh: Stride of dout's heads, in elements.
        total_q: Number of packed queries T.
        keep_scale: 1 / keep probability of dropout.
        HEADS: Number of query heads.
        HEAD_DIM: Head dim D.
        BLOCK_D: D rounded up to a power of two.
        ROWS: Number of tokens of a program.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    inside = row < total_q
    mask = inside[:, None] & (column < HEAD_DIM)[None, :]
    token = row.to(tl.int64)
    out = tl.load(
        out_ptr + token[:, None] * stride_ot + head * stride_oh + column[None, :], mask, 0.0
    )
    dout = tl.load(
        dout_ptr + token[:, None] * stride_dot + head * stride_doh + column[None, :], mask, 0.0
    )
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    offset = head * total_q + token
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + offset, inside, 0.0)
    lse = tl.load(lse_ptr + offset, inside, 0.0)
    # lse = +inf gives a query that saw no key weights of 2^(x - inf) = 0.
    lse2 = tl.where(lse == float("-inf"), float("inf"), lse * _LOG2_E)
    tl.store(delta_ptr + offset, delta, inside)
    tl.store(lse2_ptr + offset, lse2, inside)
    if kept_delta_ptr is not None:
        tl.store(kept_delta_ptr + offset, delta / keep_scale, inside)
    if dq_ptr is not None:
        # Queries that saw no key are found by out = 0: with a sink their lse is the sink.
        blind = (tl.max(tl.abs(out.to(tl.float32)), 1) == 0.0)[:, None]
        dq_offset = (token * HEADS + head)[:, None] * HEAD_DIM + column[None, :]
        zero = tl.zeros([ROWS, BLOCK_D], dq_ptr.dtype.element_ty)
        tl.store(dq_ptr + dq_offset, zero, mask & blind)


@triton.jit(do_not_specialize=["documents", "rounds", "slabs_per_head"])
def varlen_round_dq_kernel(
    sum_ptr,
    dq_ptr,
    cu_q_ptr,
    documents,
    rounds,
    slabs_per_head,
    scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SLABS: tl.constexpr,
):
    """Scales the float32 sum of partial dq, rounds it to dq's dtype, and writes it in dq's layout.

    A slab of the sum holds 16 queries of one document. Grid: (blocks of SLABS slabs, heads). A
    binary search of `rounds` steps finds the document of each slab.

    Args:
        sum_ptr: Sum of the partial dq, [heads, slabs, D / 8, 32, 4] float32. `first_slab` in
            hopper_bwd_dq.py describes the order of a slab's numbers.
        dq_ptr: The gradient to write, [T, heads, D] bfloat16 or float16.
        cu_q_ptr: Cumulative query lengths, [documents + 1] int32.
        documents: Number of documents.
        rounds: Steps of the binary search, enough to tell `documents` documents apart.
        slabs_per_head: Number of slabs per head in the sum.
        scale: Softmax scale, by which the sum is multiplied.
        HEADS: Number of query heads.
        HEAD_DIM: Head dim D.
        BLOCK_D: D rounded up to a power of two.
        SLABS: Number of slabs that a program writes.
    """
    first = tl.program_id(0) * SLABS
    head = tl.program_id(1)
    slab = first + tl.arange(0, SLABS)[:, None]
    item = tl.arange(0, 16 * BLOCK_D)[None, :]
    offset = (head.to(tl.int64) * slabs_per_head + slab) * (16 * HEAD_DIM) + item
    mask = (slab < slabs_per_head) & (item < 16 * HEAD_DIM)
    value = tl.load(sum_ptr + offset, mask, 0.0) * scale
    # Order of the numbers of eight columns: row % 8, column // 2, row // 8, column % 2.
    value = tl.reshape(value, (SLABS, BLOCK_D // 8, 8, 4, 2, 2))
    value = tl.reshape(tl.permute(value, (0, 4, 2, 1, 3, 5)), (SLABS * 16, BLOCK_D))
    row = tl.arange(0, SLABS * 16)
    slab_of_row = first + row // 16
    document = tl.zeros([SLABS * 16], tl.int32)
    beyond = document + documents
    for _ in range(rounds):
        middle = (document + beyond) // 2
        later = tl.load(cu_q_ptr + middle) // 16 + middle > slab_of_row
        document = tl.where(later, document, middle)
        beyond = tl.where(later, middle, beyond)
    begin = tl.load(cu_q_ptr + document)
    token = begin + (slab_of_row - begin // 16 - document) * 16 + row % 16
    inside = token < tl.load(cu_q_ptr + document + 1)
    column = tl.arange(0, BLOCK_D)
    dq_offset = (token.to(tl.int64) * HEADS + head)[:, None] * HEAD_DIM + column[None, :]
    mask_dq = inside[:, None] & (column < HEAD_DIM)[None, :]
    tl.store(dq_ptr + dq_offset, value.to(dq_ptr.dtype.element_ty), mask_dq)


def round_dq_slabs(dq_sum: Tensor, dq: Tensor, pack: TiledPack, scale: float) -> None:
    """Launches varlen_round_dq_kernel.

    Args:
        dq_sum: Sum of partial dq in slabs of 16 queries, [H, slabs, 16 * D] float32.
        dq: Gradient to write, [T, H, D], contiguous.
        pack: Boundaries of the documents.
        scale: Factor of the sum.
    """
    _, heads, head_dim = dq.shape
    per_head = dq_sum.shape[1]
    documents = pack.cu_seqlens_q.shape[0] - 1
    launch(varlen_round_dq_kernel, (cdiv(per_head * 16, PREPARE_ROWS), heads))(
        dq_sum,
        dq,
        pack.cu_seqlens_q,
        documents,
        documents.bit_length(),
        per_head,
        scale,
        HEADS=heads,
        HEAD_DIM=head_dim,
        BLOCK_D=padded_columns(head_dim),
        SLABS=PREPARE_ROWS // 16,
        num_warps=8,
        enable_fp_fusion=True,
    )


def varlen_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    pack: TiledPack,
    options: AttentionOptions,
    into: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launches the Hopper backward, and returns dq, dk, dv and delta.

    Arguments and results are those of varlen.triton_bwd.varlen_bwd. `into` are the tensors to which
    dq, dk and dv are written, contiguous; None makes new ones. They may be k and v; q, where
    config.sums_dq_apart. Programs add partial dq in
    float32. Unless options.deterministic is set, the order of additions depends on timing, so the
    last bits of dq differ from run to run; those of dk and dv do not.

    Scratch memory: dq in float32 (at most twice as many rows if it is added from registers), and
    two or three float32 per query and head.
    """
    total_q, heads, head_dim = q.shape
    heads_kv = k.shape[1]
    dout = dout if dout.stride(2) == 1 else dout.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    if into is None:
        into = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    dq, dk, dv = into
    # Separate tensors: in one tensor, the alignment of a row would depend on the length.
    delta, lse2 = torch.empty_like(lse), torch.empty_like(lse)
    kept_delta = torch.empty_like(lse) if options.has_dropout else None
    threshold, scale_kept, first_head = dropout_arguments(options)
    columns = padded_columns(head_dim)
    if total_q == 0:
        return dq, dk.zero_(), dv.zero_(), delta
    documents = pack.cu_seqlens_q.shape[0] - 1
    tile = tile_of_call(q.shape, documents, pack.max_seqlen_q, options)
    rows = slab_rows(total_q, documents) if tile.reduce_from_registers else SLAB_ROWS
    if tile.reduce_from_registers:
        per_head = total_q // rows + (documents if rows > 1 else 0)  # slabs
        slabs = (heads, per_head, rows * head_dim)
        dq_sum = torch.zeros(slabs, dtype=torch.float32, device=q.device)
        semaphores = None
    else:
        per_head = total_q // tile.block_m + documents  # semaphores
        semaphores = torch.zeros((heads, per_head), dtype=torch.int32, device=q.device)
        dq_sum = torch.empty((total_q, heads, head_dim), dtype=torch.float32, device=q.device)
    launch(varlen_prepare_kernel, (cdiv(total_q, PREPARE_ROWS), heads))(
        out,
        dout,
        lse,
        dlse,
        None if tile.reduce_from_registers else dq,
        delta,
        lse2,
        kept_delta,
        out.stride(0),
        out.stride(1),
        dout.stride(0),
        dout.stride(1),
        total_q,
        scale_kept,
        HEADS=heads,
        HEAD_DIM=head_dim,
        BLOCK_D=columns,
        ROWS=PREPARE_ROWS,
        num_warps=8,
        enable_fp_fusion=True,
    )
    window_ptr, left, right, has_left, has_right = window_arguments(options)
    shape = backward_shape(
        *(tile, columns, heads // heads_kv, heads_kv, head_dim, options.deterministic),
        slab_rows=rows,
    )
    programs = heads_kv * pack.k_tiles.shape[0] * (BLOCK_N_BACKWARD // shape.block_n)
    kernel = varlen_bwd_hopper_kernel if columns <= 128 else varlen_bwd_wide_hopper_kernel
    items: tuple[int, ...] = ()
    if is_persistent(tile):
        kernel = varlen_bwd_persistent_hopper_kernel
        items = (programs,)
        programs = min(programs, multiprocessors(q.device))
        semaphores = torch.zeros(1, dtype=torch.int32, device=q.device)  # counts work items
    launch(kernel, (programs,))(
        ragged_descriptor(q, tile.block_m, columns),
        ragged_descriptor(dout, tile.block_m, columns),
        ragged_descriptor(k, BLOCK_N_BACKWARD // 2, columns),
        ragged_descriptor(v, BLOCK_N_BACKWARD // 2, columns),
        None
        if tile.reduce_from_registers
        else ragged_descriptor(dq_sum, tile.block_m, columns // 2),
        BackwardPointers(
            lse2,
            delta if kept_delta is None else kept_delta,
            dk,
            dv,
            dq_sum,
            None if tile.reduce_from_registers else dq,
            pack.cu_seqlens_q,
            pack.cu_seqlens_k,
            pack.k_tiles,
            window_ptr,
            *dropout_tensors(options, pack),
            semaphores,
        ),
        per_head,
        BackwardStrides(*token_head_strides(dk, dq)),
        total_q,
        left,
        right,
        options.softmax_scale,
        options.softcap,
        threshold,
        scale_kept,
        first_head,
        *items,
        TILE=shape,
        FLAGS=Flags(
            has_left=has_left,
            has_right=has_right,
            has_softcap=options.softcap > 0,
            has_dropout=options.has_dropout,
        ),
        num_warps=4,
        maxnreg=REGISTERS,
        enable_fp_fusion=True,
    )
    scale = options.softmax_scale * scale_kept
    if tile.reduce_from_registers and rows == 1:
        dq.copy_(dq_sum.mul_(scale).transpose(0, 1))
    elif tile.reduce_from_registers:
        round_dq_slabs(dq_sum, dq, pack, scale)
    return dq, dk, dv, delta
