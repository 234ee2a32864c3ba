"""The portable forward kernel of varlen attention, and its launcher."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lctrain_kernels.launch import launch
from lctrain_kernels.options import AttentionOptions
from lctrain_kernels.pack import TiledPack
from lctrain_kernels.schedule import SCHEDULE_ROWS
from lctrain_kernels.tile.arguments import (
    DOT_PRECISION,
    RUNTIME_INTEGERS,
    alibi_strides,
    dropout_arguments,
    dropout_tensors,
    token_head_strides,
    window_arguments,
)
from lctrain_kernels.tile.config import tile_config
from lctrain_kernels.tile.dropout import dropout_head, keep_mask, load_key
from lctrain_kernels.tile.logits import LOG2_E, logits, logits_multiplier
from lctrain_kernels.tile.mask import key_ranges, load_window, mask_logits
from lctrain_kernels.tile.memory import load_rows, store_rows
from lctrain_kernels.tile.seqlen import document_bounds, locate_program
from lctrain_kernels.tile.softmax import add_sink, finish, softmax_step
from lctrain_kernels.tile.structures import Flags, tile_shape

_LOG2_E = tl.constexpr(LOG2_E)


class ForwardPointers(NamedTuple):
    """Pointers to the tensors that varlen_fwd_kernel accesses.

    The kernel's docstring gives the shapes of operands and results. Boundaries, tiles, document_ids
    and query_offsets are those of TiledPack; options are those of AttentionOptions.
    """

    q: Any
    k: Any
    v: Any
    out: Any
    lse: Any
    cu_seqlens_q: Any
    cu_seqlens_k: Any
    tiles: Any
    window: Any
    alibi_slopes: Any
    learnable_sink: Any
    dropout_seed: Any
    document_ids: Any
    query_offsets: Any


class ForwardStrides(NamedTuple):
    """Strides of tokens and of heads of each tensor, in elements."""

    q_token: Any
    q_head: Any
    k_token: Any
    k_head: Any
    v_token: Any
    v_head: Any
    out_token: Any
    out_head: Any


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def varlen_fwd_kernel(
    pointers: ForwardPointers,
    strides: ForwardStrides,
    stride_alibi,
    num_tiles,
    total_q,
    window_left,
    window_right,
    scale,
    softcap,
    threshold,
    keep_scale,
    first_head,
    TILE: tl.constexpr,
    FLAGS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Computes out and lse of a tile of queries of one document.

    A tile has BLOCK_M rows: PACK query heads of one key/value head times BLOCK_M / PACK positions.
    Shapes: q and out [T, H, D], k and v [Tk, Hk, D], lse [H, T] float32.

    The grid has one axis: key/value heads x scheduled tiles x blocks of a tile (SCHEDULE_ROWS *
    PACK / BLOCK_M) x packs of heads (GROUP / PACK). A scheduled tile has SCHEDULE_ROWS positions.

    tile/arguments.py describes the arguments that are not named here.
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
    left, right = load_window(pointers.window, window_left, window_right)
    low, clear_low, clear_high, high = key_ranges(
        first,
        POSITIONS,
        shift,
        length_k,
        left,
        right,
        FLAGS.has_left,
        FLAGS.has_right,
        BLOCK_N,
    )

    local_m = tl.arange(0, BLOCK_M)
    local_n = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_D)
    local_query = local_m % POSITIONS
    query = first + local_query
    tile_head = head_kv * TILE.group + head_group * TILE.pack + local_m // POSITIONS
    head = tl.where(query < length_q, tile_head, 0).to(tl.int64)
    row_q = (begin_q + query) * strides.q_token + head * strides.q_head
    q = load_rows(
        pointers.q + row_q[:, None] + columns[None, :],
        query,
        length_q,
        columns,
        TILE.head_dim,
        BLOCK_D,
        True,
    )
    k_base = pointers.k + begin_k * strides.k_token + head_kv.to(tl.int64) * strides.k_head
    v_base = pointers.v + begin_k * strides.v_token + head_kv.to(tl.int64) * strides.v_head
    tile_k = local_n[:, None] * strides.k_token + columns[None, :]
    tile_v = local_n[:, None] * strides.v_token + columns[None, :]

    slope = 0.0
    if FLAGS.has_alibi:
        slope = tl.load(pointers.alibi_slopes + document * stride_alibi + head)[:, None]
    key_0 = 0
    key_1 = 0
    document_key = 0
    query_offset = 0
    if FLAGS.has_dropout:
        key_0, key_1, document_key, query_offset = load_key(
            pointers.dropout_seed, pointers.document_ids, pointers.query_offsets, document
        )
    multiplier = logits_multiplier(scale, FLAGS.has_softcap, FLAGS.has_alibi)
    first_seen = query + shift - left
    last_seen = tl.minimum(query + shift + right, length_k - 1)

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # Ranges of key tiles: those that the left bound cuts, those without a mask, the diagonal's.
    for part in tl.static_range(0 if FLAGS.has_left else 1, 3):
        begin = low if part == 0 else (clear_low if part == 1 else clear_high)
        end = clear_low if part == 0 else (clear_high if part == 1 else high)
        # The branch skips the loop for an empty range, and pointers advance by addition. Without
        # either, ptxas may serialise the products (C7515).
        if begin < end:
            k_tile = k_base + tl.cast(begin, tl.int64) * strides.k_token
            v_tile = v_base + tl.cast(begin, tl.int64) * strides.v_token
            for n in tl.range(begin, end, BLOCK_N):
                key = n + local_n
                k = load_rows(
                    k_tile + tile_k,
                    key,
                    length_k,
                    columns,
                    TILE.head_dim,
                    BLOCK_D,
                    part != 1,
                )
                s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
                x = logits(
                    s,
                    query[:, None],
                    key[None, :],
                    shift,
                    scale,
                    softcap,
                    slope,
                    FLAGS.has_softcap,
                    FLAGS.has_alibi,
                )
                if part != 1:
                    x = mask_logits(
                        x, local_n[None, :], first_seen - n, last_seen - n, FLAGS.has_left, True
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
                    part != 1,
                )
                acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
                k_tile += BLOCK_N * strides.k_token
                v_tile += BLOCK_N * strides.v_token
    if FLAGS.has_sink:
        acc, m, l = add_sink(
            acc, m, l, tl.load(pointers.learnable_sink + head).to(tl.float32) * _LOG2_E
        )
    out, lse = finish(acc, m, l, keep_scale)
    row_o = (begin_q + query) * strides.out_token + head * strides.out_head
    store_rows(
        pointers.out + row_o[:, None] + columns[None, :],
        out,
        query,
        length_q,
        columns,
        TILE.head_dim,
        BLOCK_D,
    )
    row_lse = head * total_q + begin_q + query
    tl.store(pointers.lse + row_lse, lse, mask=query < length_q)


def varlen_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pack: TiledPack,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor]:
    """Launches varlen_fwd_kernel.

    Args:
        q: Packed queries [T, H, D], float16, bfloat16 or float32, last stride 1.
        k: Packed keys [Tk, Hk, D].
        v: Packed values [Tk, Hk, D].
        pack: Boundaries of the documents, with their tile schedule.
        options: Mask, scale and the other attention options of the call.

    Returns:
        out [T, H, D] in q's dtype and lse [H, T] float32.
    """
    total_q, heads, head_dim = q.shape
    heads_kv = k.shape[1]
    out = torch.empty((total_q, heads, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, total_q), dtype=torch.float32, device=q.device)
    group = heads // heads_kv
    config = tile_config("varlen_fwd", q, group, options.has_dropout)
    window_ptr, left, right, has_left, has_right = window_arguments(options)
    threshold, scale_kept, first_head = dropout_arguments(options)
    parts = SCHEDULE_ROWS // config.positions * (group // config.pack)
    grid = (heads_kv * pack.q_tiles.shape[0] * parts,)
    if grid[0] == 0:
        return out, lse
    launch(varlen_fwd_kernel, grid)(
        ForwardPointers(
            q,
            k,
            v,
            out,
            lse,
            pack.cu_seqlens_q,
            pack.cu_seqlens_k,
            pack.q_tiles,
            window_ptr,
            options.alibi_slopes,
            options.learnable_sink,
            *dropout_tensors(options, pack),
        ),
        ForwardStrides(*token_head_strides(q, k, v, out)),
        alibi_strides(options.alibi_slopes),
        pack.q_tiles.shape[0],
        total_q,
        left,
        right,
        options.softmax_scale,
        options.softcap,
        threshold,
        scale_kept,
        first_head,
        TILE=tile_shape(config, head_dim, group),
        FLAGS=Flags(
            has_left=has_left,
            has_right=has_right,
            has_softcap=options.softcap > 0,
            has_alibi=options.alibi_slopes is not None,
            has_sink=options.learnable_sink is not None,
            has_dropout=options.has_dropout,
        ),
        PRECISION=DOT_PRECISION,
        **config.options,
    )
    return out, lse
