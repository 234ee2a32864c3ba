"""The portable forward kernel of differential attention, and its launcher."""

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
    dropout_arguments,
    dropout_tensors,
    token_head_strides,
    window_arguments,
)
from lctrain_kernels.tile.config import tile_config
from lctrain_kernels.tile.dropout import dropout_head, keep_mask, load_key
from lctrain_kernels.tile.logits import logits_multiplier
from lctrain_kernels.tile.mask import key_ranges, load_window, mask_logits
from lctrain_kernels.tile.memory import load_rows, store_rows
from lctrain_kernels.tile.seqlen import document_bounds, locate_program
from lctrain_kernels.tile.softmax import finish, softmax_step
from lctrain_kernels.tile.structures import Flags, tile_shape


class ForwardPointers(NamedTuple):
    """Pointers to the tensors that differential_fwd_kernel accesses.

    The kernel's docstring gives the shapes of operands and results. Boundaries, tiles, document_ids
    and query_offsets are those of TiledPack; options are those of AttentionOptions.
    """

    q1: Any
    q2: Any
    k1: Any
    k2: Any
    v: Any
    lam: Any
    out: Any
    out1: Any
    out2: Any
    lse1: Any
    lse2: Any
    cu_seqlens_q: Any
    cu_seqlens_k: Any
    tiles: Any
    window: Any
    dropout_seed: Any
    document_ids: Any
    query_offsets: Any


class ForwardStrides(NamedTuple):
    """Strides of tokens and of heads of each tensor, in elements."""

    q1_token: Any
    q1_head: Any
    q2_token: Any
    q2_head: Any
    k1_token: Any
    k1_head: Any
    k2_token: Any
    k2_head: Any
    v_token: Any
    v_head: Any
    lam_token: Any
    lam_head: Any
    out_token: Any
    out_head: Any


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def differential_fwd_kernel(
    pointers: ForwardPointers,
    strides: ForwardStrides,
    num_tiles,
    total_q,
    window_left,
    window_right,
    scale,
    threshold,
    keep_scale,
    first_head,
    TILE: tl.constexpr,
    FLAGS: tl.constexpr,
    SHARED_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Computes the outputs and lse of both branches, for a tile of queries of one document.

    A tile has BLOCK_M rows: PACK heads of one key/value head times BLOCK_M / PACK queries.

    - q1, q2 [T, H, D]; k1, k2 [Tk, Hk, D]; v [Tk, Hk, Dv]. With SHARED_K both branches read k1.
    - lam [T, H] float32, any strides.
    - out = out1 - lam out2, out1 = A1 v and out2 = A2 v, all [T, H, Dv] with the same strides. A1
      and A2 are the attention weights of the branches.
    - lse1, lse2 [H, T] float32.

    Grid: (key/value heads * tiles * SCHEDULE_ROWS * PACK / BLOCK_M * GROUP / PACK,).

    tile/arguments.py describes the arguments that are not named here.
    """
    BLOCK_M: tl.constexpr = TILE.block_m
    BLOCK_N: tl.constexpr = TILE.block_n
    BLOCK_D: tl.constexpr = TILE.block_d
    BLOCK_DV: tl.constexpr = TILE.block_dv
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
    value_columns = tl.arange(0, BLOCK_DV)
    local_query = local_m % POSITIONS
    query = first + local_query
    inside = query < length_q
    tile_head = head_kv * TILE.group + head_group * TILE.pack + local_m // POSITIONS
    head = tl.where(inside, tile_head, 0).to(tl.int64)
    token = begin_q + query
    row_q1 = token * strides.q1_token + head * strides.q1_head
    row_q2 = token * strides.q2_token + head * strides.q2_head
    q1 = load_rows(
        pointers.q1 + row_q1[:, None] + columns[None, :],
        query,
        length_q,
        columns,
        TILE.head_dim,
        BLOCK_D,
        True,
    )
    q2 = load_rows(
        pointers.q2 + row_q2[:, None] + columns[None, :],
        query,
        length_q,
        columns,
        TILE.head_dim,
        BLOCK_D,
        True,
    )
    k1_base = pointers.k1 + begin_k * strides.k1_token + head_kv.to(tl.int64) * strides.k1_head
    v_base = pointers.v + begin_k * strides.v_token + head_kv.to(tl.int64) * strides.v_head
    tile_k1 = local_n[:, None] * strides.k1_token + columns[None, :]
    tile_v = local_n[:, None] * strides.v_token + value_columns[None, :]
    if not SHARED_K:
        k2_base = pointers.k2 + begin_k * strides.k2_token + head_kv.to(tl.int64) * strides.k2_head
        tile_k2 = local_n[:, None] * strides.k2_token + columns[None, :]
    key_0 = 0
    key_1 = 0
    document_key = 0
    query_offset = 0
    if FLAGS.has_dropout:
        key_0, key_1, document_key, query_offset = load_key(
            pointers.dropout_seed, pointers.document_ids, pointers.query_offsets, document
        )
    multiplier = logits_multiplier(scale, False, False)
    first_seen = query + shift - left
    last_seen = tl.minimum(query + shift + right, length_k - 1)

    m1 = tl.full([BLOCK_M], float("-inf"), tl.float32)
    m2 = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l1 = tl.zeros([BLOCK_M], tl.float32)
    l2 = tl.zeros([BLOCK_M], tl.float32)
    acc1 = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    acc2 = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    # Ranges of key tiles: those that the left bound cuts, those without a mask, the diagonal's.
    for part in tl.static_range(0 if FLAGS.has_left else 1, 3):
        begin = low if part == 0 else (clear_low if part == 1 else clear_high)
        end = clear_low if part == 0 else (clear_high if part == 1 else high)
        # As in varlen_fwd_kernel: the branch and the pointers keep ptxas from serialising.
        if begin < end:
            k1_tile = k1_base + tl.cast(begin, tl.int64) * strides.k1_token
            v_tile = v_base + tl.cast(begin, tl.int64) * strides.v_token
            if not SHARED_K:
                k2_tile = k2_base + tl.cast(begin, tl.int64) * strides.k2_token
            for n in tl.range(begin, end, BLOCK_N):
                key = n + local_n
                k1 = load_rows(
                    k1_tile + tile_k1,
                    key,
                    length_k,
                    columns,
                    TILE.head_dim,
                    BLOCK_D,
                    part != 1,
                )
                k2 = k1
                if not SHARED_K:
                    k2 = load_rows(
                        k2_tile + tile_k2,
                        key,
                        length_k,
                        columns,
                        TILE.head_dim,
                        BLOCK_D,
                        part != 1,
                    )
                x1 = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
                x2 = tl.dot(q2, tl.trans(k2), input_precision=PRECISION)
                if part != 1:
                    x1 = mask_logits(
                        x1, local_n[None, :], first_seen - n, last_seen - n, FLAGS.has_left, True
                    )
                    x2 = mask_logits(
                        x2, local_n[None, :], first_seen - n, last_seen - n, FLAGS.has_left, True
                    )
                v = load_rows(
                    v_tile + tile_v,
                    key,
                    length_k,
                    value_columns,
                    TILE.value_dim,
                    BLOCK_DV,
                    part != 1,
                )
                p1, alpha1, m1, l1 = softmax_step(x1, multiplier, m1, l1)
                acc1 = acc1 * alpha1[:, None]
                if FLAGS.has_dropout:
                    keep1 = keep_mask(
                        key_0,
                        key_1,
                        document_key,
                        (2 * dropout_head(tile_head, first_head))[:, None].to(tl.uint32),
                        first + query_offset,
                        local_query[:, None],
                        n,
                        local_n[None, :],
                        threshold,
                    )
                    p1 = tl.where(keep1, p1, 0.0)
                acc1 = tl.dot(p1.to(v.dtype), v, acc1, input_precision=PRECISION)
                p2, alpha2, m2, l2 = softmax_step(x2, multiplier, m2, l2)
                acc2 = acc2 * alpha2[:, None]
                if FLAGS.has_dropout:
                    keep2 = keep_mask(
                        key_0,
                        key_1,
                        document_key,
                        (2 * dropout_head(tile_head, first_head) + 1)[:, None].to(tl.uint32),
                        first + query_offset,
                        local_query[:, None],
                        n,
                        local_n[None, :],
                        threshold,
                    )
                    p2 = tl.where(keep2, p2, 0.0)
                acc2 = tl.dot(p2.to(v.dtype), v, acc2, input_precision=PRECISION)
                k1_tile += BLOCK_N * strides.k1_token
                v_tile += BLOCK_N * strides.v_token
                if not SHARED_K:
                    k2_tile += BLOCK_N * strides.k2_token
    out1, lse1 = finish(acc1, m1, l1, keep_scale)
    out2, lse2 = finish(acc2, m2, l2, keep_scale)
    lam = tl.load(
        pointers.lam + token * strides.lam_token + head * strides.lam_head, mask=inside, other=0.0
    )
    row_o = (token * strides.out_token + head * strides.out_head)[:, None] + value_columns[None, :]
    store_rows(
        pointers.out + row_o,
        out1 - lam[:, None] * out2,
        query,
        length_q,
        value_columns,
        TILE.value_dim,
        BLOCK_DV,
    )
    store_rows(
        pointers.out1 + row_o, out1, query, length_q, value_columns, TILE.value_dim, BLOCK_DV
    )
    store_rows(
        pointers.out2 + row_o, out2, query, length_q, value_columns, TILE.value_dim, BLOCK_DV
    )
    row_lse = head * total_q + token
    tl.store(pointers.lse1 + row_lse, lse1, mask=inside)
    tl.store(pointers.lse2 + row_lse, lse2, mask=inside)


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
    """Launches differential_fwd_kernel.

    Args:
        q1: Queries of branch 1, [T, H, D], float16, bfloat16 or float32, last stride 1.
        q2: Packed queries of branch 2, [T, H, D].
        k1: Packed keys of branch 1, [Tk, Hk, D].
        k2: Packed keys of branch 2, [Tk, Hk, D]; None if both branches read k1.
        v: Packed values [Tk, Hk, Dv].
        lam: Lambda of each token and head, [T, H] float32, any strides.
        pack: Boundaries of the documents, with their tile schedule.
        options: Mask, scale and the other attention options of the call.

    Returns:
        out, out1 = A1 v and out2 = A2 v [T, H, Dv] in q1's dtype, lse1 and lse2 [H, T] float32.
    """
    total_q, heads, head_dim = q1.shape
    heads_kv, value_dim = v.shape[1:]
    out = torch.empty((total_q, heads, value_dim), dtype=q1.dtype, device=q1.device)
    out1, out2 = torch.empty_like(out), torch.empty_like(out)
    lse1 = torch.empty((heads, total_q), dtype=torch.float32, device=q1.device)
    lse2 = torch.empty_like(lse1)
    group = heads // heads_kv
    config = tile_config("diff_fwd", q1, group, options.has_dropout, value_dim, k2 is None)
    window_ptr, left, right, has_left, has_right = window_arguments(options)
    threshold, scale_kept, first_head = dropout_arguments(options)
    parts = SCHEDULE_ROWS // config.positions * (group // config.pack)
    grid = (heads_kv * pack.q_tiles.shape[0] * parts,)
    if grid[0] == 0:
        return out, out1, out2, lse1, lse2
    launch(differential_fwd_kernel, grid)(
        ForwardPointers(
            q1,
            q2,
            k1,
            k2,
            v,
            lam,
            out,
            out1,
            out2,
            lse1,
            lse2,
            pack.cu_seqlens_q,
            pack.cu_seqlens_k,
            pack.q_tiles,
            window_ptr,
            *dropout_tensors(options, pack),
        ),
        ForwardStrides(
            *token_head_strides(q1, q2, k1, k1 if k2 is None else k2, v),
            *lam.stride(),
            *token_head_strides(out),
        ),
        pack.q_tiles.shape[0],
        total_q,
        left,
        right,
        options.softmax_scale,
        threshold,
        scale_kept,
        first_head,
        TILE=tile_shape(config, head_dim, group, value_dim),
        FLAGS=Flags(has_left=has_left, has_right=has_right, has_dropout=options.has_dropout),
        SHARED_K=k2 is None,
        PRECISION=DOT_PRECISION,
        **config.options,
    )
    return out, out1, out2, lse1, lse2
