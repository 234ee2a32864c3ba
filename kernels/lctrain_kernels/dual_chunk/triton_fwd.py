"""The portable forward kernel of dual chunk attention, and its launcher."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lctrain_kernels.dual_chunk.operands import Operands, Rotation
from lctrain_kernels.dual_chunk.ranges import INTER, SUCC, keys_of_query, keys_of_tile
from lctrain_kernels.dual_chunk.triton_rotate import dual_chunk_rotate, rotated_keys
from lctrain_kernels.launch import launch
from lctrain_kernels.options import AttentionOptions
from lctrain_kernels.pack import TiledPack
from lctrain_kernels.schedule import SCHEDULE_ROWS
from lctrain_kernels.tile.arguments import (
    DOT_PRECISION,
    RUNTIME_INTEGERS,
    dropout_arguments,
    dropout_tensors,
    token_head_strides,
)
from lctrain_kernels.tile.config import tile_config
from lctrain_kernels.tile.dropout import dropout_head, keep_mask, load_key
from lctrain_kernels.tile.logits import LOG2_E
from lctrain_kernels.tile.mask import mask_logits
from lctrain_kernels.tile.memory import load_rows, store_rows
from lctrain_kernels.tile.rotary import load_pairs, pair_columns
from lctrain_kernels.tile.seqlen import document_bounds, locate_program
from lctrain_kernels.tile.softmax import finish, softmax_step
from lctrain_kernels.tile.structures import Flags, tile_shape

_LOG2_E = tl.constexpr(LOG2_E)


class ForwardPointers(NamedTuple):
    """Pointers to the tensors that dual_chunk_fwd_kernel accesses.

    The kernel's docstring gives the shapes of operands and results. Boundaries, tiles, document_ids
    and query_offsets are those of TiledPack; options are those of AttentionOptions.
    """

    q: Any
    k: Any
    k_succ: Any
    v: Any
    out: Any
    lse: Any
    cu_seqlens_q: Any
    cu_seqlens_k: Any
    tiles: Any
    logit_scale: Any
    dropout_seed: Any
    document_ids: Any
    query_offsets: Any


class ForwardStrides(NamedTuple):
    """Strides of tokens and of heads of each tensor, in elements."""

    q_token: Any
    q_head: Any
    k_token: Any
    k_head: Any
    k_succ_token: Any
    k_succ_head: Any
    v_token: Any
    v_head: Any
    out_token: Any
    out_head: Any


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def dual_chunk_fwd_kernel(
    pointers: ForwardPointers,
    strides: ForwardStrides,
    num_tiles,
    total_q,
    chunk_length,
    succ_length,
    scale,
    threshold,
    keep_scale,
    first_head,
    TILE: tl.constexpr,
    FLAGS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Computes out and lse of a tile of queries of one document.

    A tile has BLOCK_M rows: PACK query heads of one key/value head times BLOCK_M / PACK queries.
    One softmax runs over the three ranges of ranges.py: INTER with queries at the inter position,
    SUCC with keys rotated by -c, INTRA with unrotated queries and keys.

    Shapes: q and out [T, H, D]; k, v and k_succ [Tk, Hk, D]; lse [H, T] float32; logit_scale [N]
    float32. dual_chunk_rotate writes k_succ, the rotated keys, and stores the queries at the inter
    position in out; each program reads its rows of out before it overwrites them.

    Grid: that of varlen_fwd_kernel.

    chunk_length is c, the number of tokens of a chunk, and succ_length the number of SUCC queries
    at its start. tile/arguments.py describes the arguments that are not named here.
    """
    BLOCK_M: tl.constexpr = TILE.block_m
    BLOCK_N: tl.constexpr = TILE.block_n
    BLOCK_D: tl.constexpr = TILE.block_d
    POSITIONS: tl.constexpr = BLOCK_M // TILE.pack
    head_kv, head_group, document, first = locate_program(
        pointers.tiles, num_tiles, POSITIONS, TILE.group // TILE.pack
    )
    if document < 0:
        return
    begin_q, length_q = document_bounds(pointers.cu_seqlens_q, document)
    begin_k, length_k = document_bounds(pointers.cu_seqlens_k, document)
    if first >= length_q:
        return
    shift = length_k - length_q
    last = tl.minimum(first + POSITIONS, length_q) - 1 + shift

    local_m = tl.arange(0, BLOCK_M)
    local_n = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_D)
    pairs = pair_columns(TILE.head_dim, BLOCK_D)
    local_query = local_m % POSITIONS
    query = first + local_query
    tile_head = head_kv * TILE.group + head_group * TILE.pack + local_m // POSITIONS
    head = tl.where(query < length_q, tile_head, 0).to(tl.int64)
    token = begin_q + query
    k_intra = pointers.k + begin_k * strides.k_token + head_kv.to(tl.int64) * strides.k_head
    k_succ = (
        pointers.k_succ
        + begin_k * strides.k_succ_token
        + head_kv.to(tl.int64) * strides.k_succ_head
    )
    v_base = pointers.v + begin_k * strides.v_token + head_kv.to(tl.int64) * strides.v_head
    tile_v = local_n[:, None] * strides.v_token + columns[None, :]
    key_0 = 0
    key_1 = 0
    document_key = 0
    query_offset = 0
    if FLAGS.has_dropout:
        key_0, key_1, document_key, query_offset = load_key(
            pointers.dropout_seed, pointers.document_ids, pointers.query_offsets, document
        )
    multiplier = scale * _LOG2_E
    if pointers.logit_scale is not None:
        multiplier *= tl.load(pointers.logit_scale + document)
    position = query + shift

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for relation in tl.range(0, 3):
        low, clear, high = keys_of_tile(
            first + shift, last, relation, chunk_length, succ_length, BLOCK_N, FLAGS.has_dropout
        )
        if low < high:
            # Strides that depend on the range keep LLVM from holding both rows of pointers in
            # registers throughout the loops.
            row = token * tl.where(relation == INTER, strides.out_token, strides.q_token)
            row += head * tl.where(relation == INTER, strides.out_head, strides.q_head)
            q = load_pairs(
                tl.where(relation == INTER, pointers.out, pointers.q)
                + row[:, None]
                + pairs[None, :],
                query,
                length_q,
                TILE.head_dim,
                BLOCK_D,
                True,
            )
            first_seen, last_seen = keys_of_query(position, relation, chunk_length, succ_length)
            stride_k = tl.where(relation == SUCC, strides.k_succ_token, strides.k_token)
            k_base = tl.where(relation == SUCC, k_succ, k_intra)
            tile_k = local_n[:, None] * stride_k + pairs[None, :]
            # Tiles without a mask, then those with one.
            for part in tl.static_range(0, 2):
                begin = low if part == 0 else clear
                end = clear if part == 0 else high
                # The branch keeps the accumulator of an empty range out of the loop's pipeline of
                # products, and pointers advance by addition; without either ptxas may serialise
                # the products (C7515).
                if begin < end:
                    k_tile = k_base + tl.cast(begin, tl.int64) * stride_k
                    v_tile = v_base + tl.cast(begin, tl.int64) * strides.v_token
                    for n in tl.range(begin, end, BLOCK_N):
                        key = n + local_n
                        k = load_pairs(
                            k_tile + tile_k, key, length_k, TILE.head_dim, BLOCK_D, part == 1
                        )
                        x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
                        if part == 1:
                            x = mask_logits(
                                x, local_n[None, :], first_seen - n, last_seen - n, True, True
                            )
                        p, alpha, m, l = softmax_step(x, multiplier, m, l)
                        acc = acc * alpha[:, None]
                        if FLAGS.has_dropout:
                            keep = keep_mask(
                                key_0,
                                key_1,
                                document_key,
                                dropout_head(tile_head, first_head)[:, None].to(tl.uint32),
                                first + query_offset,
                                local_query[:, None],
                                n,
                                local_n[None, :],
                                threshold,
                            )
                            p = tl.where(keep, p, 0.0)
                        v = load_rows(
                            v_tile + tile_v,
                            key,
                            length_k,
                            columns,
                            TILE.head_dim,
                            BLOCK_D,
                            part == 1,
                        )
                        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
                        k_tile += BLOCK_N * stride_k
                        v_tile += BLOCK_N * strides.v_token
    out, lse = finish(acc, m, l, keep_scale)
    row_o = token * strides.out_token + head * strides.out_head
    store_rows(
        pointers.out + row_o[:, None] + columns[None, :],
        out,
        query,
        length_q,
        columns,
        TILE.head_dim,
        BLOCK_D,
    )
    row_lse = head * total_q + token
    tl.store(pointers.lse + row_lse, lse, mask=query < length_q)


def dual_chunk_fwd(
    operands: Operands,
    rotation: Rotation,
    pack: TiledPack,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor]:
    """Launches dual_chunk_fwd_kernel, after the rotations of queries and keys.

    Scratch memory: keys rotated by -c [Tk, Hk, D].

    Args:
        operands: Queries, keys, values and the other inputs of the operator.
        rotation: Rotation of queries and keys.
        pack: Boundaries of the documents, with their tile schedule.
        options: Mask, scale and the other attention options of the call.

    Returns:
        out [T, H, D] in q's dtype and lse [H, T] float32.
    """
    q, k, v = operands.q, operands.k, operands.v
    total_q, heads, head_dim = q.shape
    heads_kv = k.shape[1]
    out = torch.empty((total_q, heads, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, total_q), dtype=torch.float32, device=q.device)
    group = heads // heads_kv
    config = tile_config("dual_chunk_fwd", q, group, options.has_dropout)
    threshold, scale_kept, first_head = dropout_arguments(options)
    parts = SCHEDULE_ROWS // config.positions * (group // config.pack)
    grid = (heads_kv * pack.q_tiles.shape[0] * parts,)
    if grid[0] == 0:
        return out, lse
    k_succ = rotated_keys(k, pack.cu_seqlens_k, pack.k_tiles, rotation=rotation)
    dual_chunk_rotate(
        q, out, pack.cu_seqlens_q, pack.cu_seqlens_k, pack.q_tiles, is_query=True, rotation=rotation
    )
    launch(dual_chunk_fwd_kernel, grid)(
        ForwardPointers(
            q,
            k,
            k_succ,
            v,
            out,
            lse,
            pack.cu_seqlens_q,
            pack.cu_seqlens_k,
            pack.q_tiles,
            operands.logit_scale,
            *dropout_tensors(options, pack),
        ),
        ForwardStrides(*token_head_strides(q, k, k_succ, v, out)),
        pack.q_tiles.shape[0],
        total_q,
        rotation.chunk_length,
        rotation.succ_length,
        options.softmax_scale,
        threshold,
        scale_kept,
        first_head,
        TILE=tile_shape(config, head_dim, group),
        FLAGS=Flags(has_dropout=options.has_dropout),
        PRECISION=DOT_PRECISION,
        **config.options,
    )
    return out, lse
