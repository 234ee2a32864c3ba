"""Rotates queries and keys by RoPE before the kernels of dual chunk attention.

For the backward, it also computes statistics per query: base-2 lse and delta.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lctrain_kernels.dual_chunk.operands import Rotation
from lctrain_kernels.dual_chunk.ranges import inter_delta, inter_end
from lctrain_kernels.launch import launch
from lctrain_kernels.schedule import SCHEDULE_ROWS
from lctrain_kernels.tile.arguments import RUNTIME_INTEGERS, token_head_strides
from lctrain_kernels.tile.config import TileConfig
from lctrain_kernels.tile.logits import LOG2_E
from lctrain_kernels.tile.memory import load_rows
from lctrain_kernels.tile.rotary import (
    cos_sin,
    load_frequencies,
    load_pairs,
    pair_columns,
    rotate,
    store_pairs,
)
from lctrain_kernels.tile.seqlen import document_bounds, locate_program
from lctrain_kernels.tile.structures import tile_shape

_LOG2_E = tl.constexpr(LOG2_E)

# The kernel is bound by memory, so any tile that fills the GPU is as fast.
ROTATE_CONFIG = TileConfig(block_m=32, block_n=0, num_warps=4, num_stages=1)


class RotatePointers(NamedTuple):
    """Pointers to the tensors that dual_chunk_rotate_kernel accesses.

    The kernel's docstring gives their shapes; inv_freq is [D / 2] float32. Boundaries and tiles are
    those of TiledPack.
    """

    x: Any
    rotated: Any
    out: Any
    dout: Any
    lse: Any
    dlse: Any
    stats: Any
    cu_seqlens_x: Any
    cu_seqlens_k: Any
    tiles: Any
    inv_freq: Any


class RotateStrides(NamedTuple):
    """Strides of tokens and of heads of each tensor, in elements."""

    x_token: Any
    x_head: Any
    rotated_token: Any
    rotated_head: Any
    out_token: Any
    out_head: Any
    dout_token: Any
    dout_head: Any


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def dual_chunk_rotate_kernel(
    pointers: RotatePointers,
    strides: RotateStrides,
    num_tiles,
    total_q,
    chunk_length,
    succ_length,
    inter_position,
    keep_scale,
    TILE: tl.constexpr,
    IS_QUERY: tl.constexpr,
):
    """Writes rotated copies of one tile of one head: of queries for INTER keys, or of SUCC keys.

    With IS_QUERY, x holds queries, which RoPE has already rotated to their position in the chunk;
    they are rotated further, to inter_position. Otherwise x holds keys, and each is rotated by
    -chunk_length. This gives the logits of SUCC queries that are rotated by chunk_length. Tiles of
    queries without INTER keys, and documents of one chunk, get no rotated copy.

    chunk_length is the number of tokens of a chunk, whose first succ_length queries see SUCC keys.
    dual_chunk/ranges.py defines SUCC and INTER.

    If pointers.stats is given, as for queries in the backward, the kernel also writes the
    statistics per query that the backward kernels read.

    - x, rotated, out, dout [T, H, D]; lse, dlse [H, T] float32. out and dout are the output of
      the forward and its gradient; dlse is the gradient of lse.
    - stats [H, T, 4] float32: base-2 lse (+inf for a query that saw no key), delta / keep_scale
      with delta = rowsum(dout * out) - dlse, and two unused numbers.

    Grid: (heads * tiles * SCHEDULE_ROWS / BLOCK_M,).

    tile/arguments.py describes the arguments that are not named here.
    """
    BLOCK_M: tl.constexpr = TILE.block_m
    BLOCK_D: tl.constexpr = TILE.block_d
    head, _, document, first = locate_program(pointers.tiles, num_tiles, BLOCK_M, 1)
    if document < 0:
        return
    begin, length = document_bounds(pointers.cu_seqlens_x, document)
    _, length_k = document_bounds(pointers.cu_seqlens_k, document)
    if first >= length:
        return
    row = first + tl.arange(0, BLOCK_M)
    token = begin + row
    head = head.to(tl.int64)
    if pointers.stats is not None:
        columns = tl.arange(0, BLOCK_D)
        out_rows = (
            pointers.out
            + (token * strides.out_token + head * strides.out_head)[:, None]
            + columns[None, :]
        )
        out = load_rows(out_rows, row, length, columns, TILE.head_dim, BLOCK_D, True)
        dout_rows = (
            pointers.dout
            + (token * strides.dout_token + head * strides.dout_head)[:, None]
            + columns[None, :]
        )
        dout = load_rows(dout_rows, row, length, columns, TILE.head_dim, BLOCK_D, True)
        row_lse = head * total_q + token
        inside = row < length
        delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
        if pointers.dlse is not None:
            delta -= tl.load(pointers.dlse + row_lse, mask=inside, other=0.0)
        lse = tl.load(pointers.lse + row_lse, mask=inside, other=float("inf"))
        # lse = +inf gives a query that saw no key weights of 2^(x - inf) = 0.
        lse2 = tl.where(lse == float("-inf"), float("inf"), lse * _LOG2_E)
        tl.store(pointers.stats + row_lse * 4, lse2, mask=inside)
        # Dropout: ds / keep_scale = (Z / keep_scale) p dp - p delta / keep_scale; the factor goes
        # into dq and dk.
        tl.store(pointers.stats + row_lse * 4 + 1, delta / keep_scale, mask=inside)
    # Documents of one chunk have INTRA keys only, so nothing is rotated. Queries before the first
    # one with INTER keys are skipped. Keys are not skipped, because a tile of SUCC keys may extend
    # into the next chunk.
    last = tl.minimum(first + BLOCK_M, length) - 1
    if length_k <= chunk_length:
        return
    if IS_QUERY and inter_end(last + length_k - length, chunk_length, succ_length) <= 0:
        return
    pairs = pair_columns(TILE.head_dim, BLOCK_D)
    x_rows = (
        pointers.x + (token * strides.x_token + head * strides.x_head)[:, None] + pairs[None, :]
    )
    x = load_pairs(x_rows, row, length, TILE.head_dim, BLOCK_D, True)
    if IS_QUERY:
        delta = inter_delta(row + length_k - length, chunk_length, inter_position)
    else:
        delta = tl.zeros([BLOCK_M], tl.float32) - chunk_length
    turns, turns_rest = load_frequencies(pointers.inv_freq, TILE.head_dim, BLOCK_D)
    cos, sin = cos_sin(delta[:, None], turns[None, :], turns_rest[None, :])
    rotated_rows = (
        pointers.rotated
        + (token * strides.rotated_token + head * strides.rotated_head)[:, None]
        + pairs[None, :]
    )
    store_pairs(
        rotated_rows,
        rotate(x, cos, sin, BLOCK_M, BLOCK_D),
        row,
        length,
        TILE.head_dim,
        BLOCK_D,
    )


def dual_chunk_rotate(
    x: Tensor,
    rotated: Tensor,
    cu_seqlens_x: Tensor,
    cu_seqlens_k: Tensor,
    tiles: Tensor,
    *,
    rotation: Rotation,
    is_query: bool,
    out: Tensor | None = None,
    dout: Tensor | None = None,
    lse: Tensor | None = None,
    dlse: Tensor | None = None,
    stats: Tensor | None = None,
    scale_kept: float = 1.0,
) -> Tensor:
    """Launches dual_chunk_rotate_kernel.

    Args:
        x: Queries or keys, [T, H, D], last stride 1.
        rotated: Buffer for the rotated x, [T, H, D]. Rows that are not needed are not written.
        cu_seqlens_x: Cumulative document lengths of x, [N + 1] int32.
        cu_seqlens_k: Cumulative key lengths, [N + 1] int32.
        tiles: Tiles of x's rows from a TileSchedule, [n, 2] int32.
        rotation: Rotation of the rows.
        is_query: Whether to rotate queries to the inter position; otherwise keys are rotated by -c.
        out: Output of the forward, [T, H, D]. It is passed only with dout, lse and stats, to
            compute statistics of queries.
        dout: Gradient of the output, [T, H, D], last stride 1.
        lse: Log-sum-exp of the forward, [H, T] float32.
        dlse: Gradient of lse, [H, T] float32, or None.
        stats: Buffer for the statistics, [H, T, 4] float32.
        scale_kept: 1 / keep probability, the factor of kept weights.

    Returns:
        `rotated`.
    """
    tokens, heads, head_dim = x.shape
    grid = (heads * tiles.shape[0] * (SCHEDULE_ROWS // ROTATE_CONFIG.block_m),)
    if grid[0] > 0:
        launch(dual_chunk_rotate_kernel, grid)(
            RotatePointers(
                x,
                rotated,
                out,
                dout,
                lse,
                dlse,
                stats,
                cu_seqlens_x,
                cu_seqlens_k,
                tiles,
                rotation.inv_freq,
            ),
            RotateStrides(*token_head_strides(x, rotated, out, dout)),
            tiles.shape[0],
            tokens,
            rotation.chunk_length,
            rotation.succ_length,
            rotation.inter_position,
            scale_kept,
            TILE=tile_shape(ROTATE_CONFIG, head_dim, 1),
            IS_QUERY=is_query,
            **ROTATE_CONFIG.options,
        )
    return rotated


def rotated_keys(
    k: Tensor,
    cu_seqlens_k: Tensor,
    k_tiles: Tensor,
    *,
    rotation: Rotation,
) -> Tensor:
    """Returns the keys with RoPE applied by -c positions, where c is the chunk length.

    The result is [Tk, Hk, D], contiguous, in k's dtype.

    Args:
        k: Packed keys [Tk, Hk, D], last stride 1.
        cu_seqlens_k: Cumulative key lengths, [N + 1] int32.
        k_tiles: Tiles of keys from a TileSchedule, [n, 2] int32.
        rotation: RoPE frequencies and chunk length.
    """
    return dual_chunk_rotate(
        k,
        torch.empty(k.shape, dtype=k.dtype, device=k.device),
        cu_seqlens_k,
        cu_seqlens_k,
        k_tiles,
        rotation=rotation,
        is_query=False,
    )
