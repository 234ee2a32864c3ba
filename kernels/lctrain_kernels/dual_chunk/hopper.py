"""Launches the Hopper kernels of dual chunk attention.

Two Triton kernels between and after the backward launches are defined here.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lctrain_kernels.dual_chunk.hopper_bwd import dual_chunk_bwd_hopper_kernel
from lctrain_kernels.dual_chunk.hopper_dq import finish_dq_slabs, zero_dq_slabs
from lctrain_kernels.dual_chunk.hopper_fwd import dual_chunk_fwd_hopper_kernel
from lctrain_kernels.dual_chunk.hopper_structures import (
    BackwardPointers,
    BackwardStrides,
    ForwardPointers,
)
from lctrain_kernels.dual_chunk.hopper_support import backward_form, forward_tile
from lctrain_kernels.dual_chunk.operands import Operands, Rotation
from lctrain_kernels.dual_chunk.ranges import (
    INTER,
    INTRA,
    SUCC,
    chunk_begin,
    inter_delta,
    inter_end,
)
from lctrain_kernels.dual_chunk.triton_rotate import (
    ROTATE_CONFIG,
    dual_chunk_rotate,
    rotated_keys,
)
from lctrain_kernels.gluon.config import (
    BLOCK_N_BACKWARD,
    CONSUMERS,
    REGISTERS,
    backward_shape,
    forward_shape,
    pack_heads,
)
from lctrain_kernels.gluon.launch import multiprocessors, padded_columns, ragged_descriptor
from lctrain_kernels.launch import launch
from lctrain_kernels.options import AttentionOptions
from lctrain_kernels.pack import TiledPack
from lctrain_kernels.schedule import SCHEDULE_ROWS
from lctrain_kernels.tile.arguments import (
    RUNTIME_INTEGERS,
    dropout_arguments,
    dropout_tensors,
    padded_head_dim,
    token_head_strides,
)
from lctrain_kernels.tile.rotary import (
    cos_sin,
    load_frequencies,
    load_pairs,
    pair_columns,
    rotate,
    store_pairs,
)
from lctrain_kernels.tile.seqlen import document_bounds, locate_program
from lctrain_kernels.tile.structures import Flags


def dual_chunk_fwd(
    operands: Operands,
    rotation: Rotation,
    pack: TiledPack,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor]:
    """Launches dual_chunk_fwd_hopper_kernel, after the rotations of queries and keys.

    Arguments and results are those of triton_fwd.dual_chunk_fwd. The function checks nothing: the
    registry calls it only for calls that the kernels support.
    """
    q, k, v = operands.q, operands.k, operands.v
    total_q, heads, head_dim = q.shape
    group = heads // k.shape[1]
    out = torch.empty((total_q, heads, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, total_q), dtype=torch.float32, device=q.device)
    heads_per_tile = pack_heads(group)
    columns = padded_columns(head_dim)
    tile = forward_tile(columns)
    positions = CONSUMERS * 64 // heads_per_tile
    items = pack.q_tiles.shape[0] * (SCHEDULE_ROWS // positions) * (heads // heads_per_tile)
    if items == 0:
        return out, lse
    k_succ = rotated_keys(k, pack.cu_seqlens_k, pack.k_tiles, rotation=rotation)
    dual_chunk_rotate(
        q, out, pack.cu_seqlens_q, pack.cu_seqlens_k, pack.q_tiles, is_query=True, rotation=rotation
    )
    run = min(64, positions)
    threshold, scale_kept, first_head = dropout_arguments(options)
    launch(dual_chunk_fwd_hopper_kernel, (min(items, multiprocessors(q.device)),))(
        ragged_descriptor(q, run, 64),
        ragged_descriptor(k, tile.block_n, columns),
        ragged_descriptor(k_succ, tile.block_n, columns),
        ragged_descriptor(v, tile.block_n, columns),
        ragged_descriptor(out, run, 64),
        ForwardPointers(
            lse,
            pack.cu_seqlens_q,
            pack.cu_seqlens_k,
            pack.q_tiles,
            torch.zeros(1, dtype=torch.int32, device=q.device),
            operands.logit_scale,
            *dropout_tensors(options, pack),
        ),
        items,
        total_q,
        rotation.chunk_length,
        rotation.succ_length,
        options.softmax_scale,
        threshold,
        scale_kept,
        first_head,
        TILE=forward_shape(tile, columns, group, heads, heads_per_tile),
        FLAGS=Flags(has_dropout=options.has_dropout),
        num_warps=4,
        maxnreg=REGISTERS,
        enable_fp_fusion=True,
    )
    return out, lse


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def dual_chunk_rotate_dk_kernel(
    dk_ptr,
    cu_k_ptr,
    tiles_ptr,
    inv_freq_ptr,
    num_tiles,
    chunk_length,
    succ_length,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Rotates dk [Tk, Hk, D] float32 by c positions, in place, after the backward's SUCC launch.

    SUCC multiplies keys that are rotated by -c. Rotating the gradient of these keys by c gives the
    gradient of the keys themselves. Grid: that of dual_chunk_rotate_kernel, over tiles of keys.

    Args:
        dk_ptr: dk, contiguous.
        cu_k_ptr: Cumulative key lengths, [N + 1] int32.
        tiles_ptr: Tiles of keys of a TileSchedule, [n, 2] int32.
        inv_freq_ptr: Inverse frequencies of RoPE, [D / 2] float32.
        num_tiles: Number of tiles.
        chunk_length: Number of tokens of a chunk, c.
        succ_length: Number of SUCC queries at the start of a chunk; if it is 0, nothing is rotated.
        HEADS: Number of key/value heads Hk.
        HEAD_DIM: Head dim D.
        BLOCK_D: Smallest power of two >= D.
        BLOCK_M: Number of keys of a program.
    """
    head, _, document, first = locate_program(tiles_ptr, num_tiles, BLOCK_M, 1)
    if document < 0:
        return
    begin, length = document_bounds(cu_k_ptr, document)
    succ_end = tl.where(succ_length > 0, chunk_begin(length - 1, chunk_length), 0)
    if first >= succ_end:
        return
    key = first + tl.arange(0, BLOCK_M)
    row = ((begin + key) * HEADS + head) * HEAD_DIM
    rows = dk_ptr + row[:, None] + pair_columns(HEAD_DIM, BLOCK_D)[None, :]
    dk = load_pairs(rows, key, succ_end, HEAD_DIM, BLOCK_D, True)
    turns, turns_rest = load_frequencies(inv_freq_ptr, HEAD_DIM, BLOCK_D)
    moved = tl.cast(chunk_length, tl.float32)
    cos, sin = cos_sin(moved, turns[None, :], turns_rest[None, :])  # [1, BLOCK_D / 2]
    dk = rotate(dk, cos, sin, BLOCK_M, BLOCK_D)
    store_pairs(rows, dk, key, succ_end, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def dual_chunk_round_dq_kernel(
    sum_ptr,
    dq_ptr,
    cu_q_ptr,
    cu_k_ptr,
    tiles_ptr,
    inv_freq_ptr,
    logit_scale_ptr,
    num_tiles,
    chunk_length,
    succ_length,
    inter_position,
    scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Writes dq = scale * sum in dq's dtype, after the last launch of the backward.

    In tiles with INTER keys, the sum is the gradient of queries rotated to the inter position, so
    it is rotated back first. Grid: that of dual_chunk_rotate_kernel, over tiles of queries.

    Args:
        sum_ptr: Sum of the gradients of q, [T, H, D] float32, contiguous.
        dq_ptr: Gradient of q to write, [T, H, D], contiguous.
        cu_q_ptr: Cumulative query lengths, [N + 1] int32.
        cu_k_ptr: Cumulative key lengths, [N + 1] int32.
        tiles_ptr: Tiles of queries of a TileSchedule, [n, 2] int32.
        inv_freq_ptr: Inverse frequencies of RoPE, [D / 2] float32.
        logit_scale_ptr: Further factor of each document's scale, [N] float32, or None.
        num_tiles: Number of tiles.
        chunk_length: Number of tokens of a chunk.
        succ_length: Number of SUCC queries at the start of a chunk.
        inter_position: Position to which INTER queries were rotated.
        scale: softmax_scale, the factor of q.k.
        HEADS: Number of query heads H.
        HEAD_DIM: Head dim D.
        BLOCK_D: Smallest power of two >= D.
        BLOCK_M: Number of queries of a program.
    """
    head, _, document, first = locate_program(tiles_ptr, num_tiles, BLOCK_M, 1)
    if document < 0:
        return
    begin, length = document_bounds(cu_q_ptr, document)
    _, length_k = document_bounds(cu_k_ptr, document)
    if first >= length:
        return
    query = first + tl.arange(0, BLOCK_M)
    pairs = pair_columns(HEAD_DIM, BLOCK_D)
    offset = (((begin + query) * HEADS + head) * HEAD_DIM)[:, None] + pairs[None, :]
    dq = load_pairs(sum_ptr + offset, query, length, HEAD_DIM, BLOCK_D, True)
    position = query + length_k - length
    last = tl.minimum(first + BLOCK_M, length) - 1 + length_k - length
    if inter_end(last, chunk_length, succ_length) > 0:  # as in dual_chunk_rotate_kernel
        turns, turns_rest = load_frequencies(inv_freq_ptr, HEAD_DIM, BLOCK_D)
        moved = inter_delta(position, chunk_length, inter_position)
        cos, sin = cos_sin(moved[:, None], turns[None, :], turns_rest[None, :])
        dq = rotate(dq, cos, -sin, BLOCK_M, BLOCK_D)
    if logit_scale_ptr is not None:
        scale *= tl.load(logit_scale_ptr + document)
    store_pairs(dq_ptr + offset, dq * scale, query, length, HEAD_DIM, BLOCK_D)


def dual_chunk_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    operands: Operands,
    rotation: Rotation,
    out: Tensor,
    lse: Tensor,
    pack: TiledPack,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the Hopper backward, which has no dropout.

    Arguments and results are those of triton_bwd.dual_chunk_bwd. Programs add dq in float32 in an
    order that depends on timing, so the last bits of dq differ from run to run; those of dk and dv
    do not.

    Scratch memory: keys rotated by -c [Tk, Hk, D], until SUCC is done; dq, dk and dv in float32;
    four float32 per query and head.
    """
    q, k, v = operands.q, operands.k, operands.v
    total_q, heads, head_dim = q.shape
    heads_kv = k.shape[1]
    dout = dout if dout.stride(2) == 1 else dout.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    # dq holds the queries at the inter position until the products have read them.
    dq = torch.empty((total_q, heads, head_dim), dtype=q.dtype, device=q.device)
    if total_q == 0:
        return dq, k.new_zeros(k.shape), v.new_zeros(v.shape)
    stats = torch.empty((heads, total_q, 4), dtype=torch.float32, device=q.device)
    dual_chunk_rotate(
        q,
        dq,
        pack.cu_seqlens_q,
        pack.cu_seqlens_k,
        pack.q_tiles,
        is_query=True,
        out=out,
        dout=dout,
        lse=lse,
        dlse=dlse,
        stats=stats,
        rotation=rotation,
    )
    documents = pack.cu_seqlens_q.shape[0] - 1
    tile, full_weights = backward_form(head_dim, total_q, documents)
    in_slabs = tile.reduce_from_registers
    if in_slabs:
        dq_sum = zero_dq_slabs(q, documents)
    else:
        dq_sum = torch.zeros((total_q, heads, head_dim), dtype=torch.float32, device=q.device)
    dk_sum, dv_sum = torch.empty((2, *k.shape), dtype=torch.float32, device=k.device)
    columns = padded_columns(head_dim)

    def run(relation: int, q: Tensor, k: Tensor, dk: Tensor | None, dv: Tensor | None) -> None:
        launch(dual_chunk_bwd_hopper_kernel, (heads_kv * pack.k_tiles.shape[0],))(
            ragged_descriptor(q, tile.block_m, columns),
            ragged_descriptor(dout, tile.block_m, columns),
            ragged_descriptor(k, BLOCK_N_BACKWARD // 2, columns),
            ragged_descriptor(v, BLOCK_N_BACKWARD // 2, columns),
            None if in_slabs else ragged_descriptor(dq_sum, tile.block_m, columns // 2),
            BackwardPointers(
                stats,
                dk,
                dv,
                dk_sum,
                dv_sum,
                dq_sum if in_slabs else None,
                pack.cu_seqlens_q,
                pack.cu_seqlens_k,
                pack.k_tiles,
                operands.logit_scale,
            ),
            dq_sum.shape[1],
            BackwardStrides(*token_head_strides(dk_sum)),
            total_q,
            rotation.chunk_length,
            rotation.succ_length,
            options.softmax_scale,
            TILE=backward_shape(tile, columns, heads // heads_kv, heads_kv, head_dim),
            RELATION=relation,
            FULL_WEIGHTS=full_weights,
            num_warps=4,
            maxnreg=REGISTERS,
            enable_fp_fusion=True,
        )

    rows = ROTATE_CONFIG.block_m
    shape = {"HEAD_DIM": head_dim, "BLOCK_D": padded_head_dim(head_dim), "BLOCK_M": rows}
    if rotation.succ_length > 0:
        k_succ = rotated_keys(k, pack.cu_seqlens_k, pack.k_tiles, rotation=rotation)
        run(SUCC.value, q, k_succ, None, None)
        del k_succ  # dk may lie there
        launch(
            dual_chunk_rotate_dk_kernel,
            (heads_kv * pack.k_tiles.shape[0] * (SCHEDULE_ROWS // rows),),
        )(
            dk_sum,
            pack.cu_seqlens_k,
            pack.k_tiles,
            rotation.inv_freq,
            pack.k_tiles.shape[0],
            rotation.chunk_length,
            rotation.succ_length,
            HEADS=heads_kv,
            num_warps=4,
            enable_fp_fusion=True,
            **shape,
        )
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    run(INTRA.value, q, k, dk, dv)
    # INTER adds the gradient of rotated queries, so the sum is rotated before that launch.
    if in_slabs:
        finish_dq_slabs(dq_sum, None, pack, rotation)
    else:
        dual_chunk_rotate(
            dq_sum,
            dq_sum,
            pack.cu_seqlens_q,
            pack.cu_seqlens_k,
            pack.q_tiles,
            is_query=True,
            rotation=rotation,
        )
    run(INTER.value, dq, k, dk, dv)
    if in_slabs:
        scales = operands.logit_scale, options.softmax_scale
        finish_dq_slabs(dq_sum, dq, pack, rotation, *scales)
        return dq, dk, dv
    launch(dual_chunk_round_dq_kernel, (heads * pack.q_tiles.shape[0] * (SCHEDULE_ROWS // rows),))(
        dq_sum,
        dq,
        pack.cu_seqlens_q,
        pack.cu_seqlens_k,
        pack.q_tiles,
        rotation.inv_freq,
        operands.logit_scale,
        pack.q_tiles.shape[0],
        rotation.chunk_length,
        rotation.succ_length,
        rotation.inter_position,
        options.softmax_scale,
        HEADS=heads,
        num_warps=4,
        enable_fp_fusion=True,
        **shape,
    )
    return dq, dk, dv
