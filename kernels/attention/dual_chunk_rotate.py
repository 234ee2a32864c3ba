"""Rotated copies of queries and keys, which the backward kernels of dual chunk attention read."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lctrain.kernels.attention.config import TileConfig
from lctrain.kernels.attention.launch import RUNTIME_INTEGERS, padded_head_dim
from lctrain.kernels.schedule import SCHEDULE_ROWS
from lctrain.kernels.tile.chunks import far_delta
from lctrain.kernels.tile.memory import load_rows, store_rows
from lctrain.kernels.tile.rotary import cos_sin, load_frequencies, pair_columns, rotate
from lctrain.kernels.tile.seqlen import document_bounds, locate_program

# Bound by memory: any tile that fills the machine will do.
ROTATE_CONFIG = TileConfig(block_m=32, block_n=0, num_warps=4, num_stages=1)


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def dual_chunk_rotate_kernel(
    x_ptr,
    rotated_ptr,
    cu_x_ptr,
    cu_k_ptr,
    tiles_ptr,
    inv_freq_ptr,
    stride_xt,
    stride_xh,
    stride_rt,
    stride_rh,
    num_tiles,
    chunk_length,
    far_position,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    IS_QUERY: tl.constexpr,
):
    """Queries at the far position, or keys rotated back by a chunk, of one tile and head.

    A query rotated by c meets a key as the query itself meets the key rotated by -c. Documents of
    one chunk are left out: nobody reads theirs.

    Grid: (heads * tiles * SCHEDULE_ROWS / BLOCK_M,). x and rotated [T, H, D].
    """
    head, _, document, first = locate_program(tiles_ptr, num_tiles, BLOCK_M, 1)
    if document < 0:
        return
    begin, length = document_bounds(cu_x_ptr, document)
    _, length_k = document_bounds(cu_k_ptr, document)
    if (first >= length) | (length_k <= chunk_length):
        return
    row = first + tl.arange(0, BLOCK_M)
    pairs = pair_columns(HEAD_DIM, BLOCK_D)
    token = begin + row
    head = head.to(tl.int64)
    x = load_rows(
        x_ptr + (token * stride_xt + head * stride_xh)[:, None] + pairs[None, :],
        row,
        length,
        pairs,
        HEAD_DIM,
        BLOCK_D,
        True,
    )
    if IS_QUERY:
        delta = far_delta(row + length_k - length, chunk_length, far_position)
    else:
        delta = tl.zeros([BLOCK_M], tl.float32) - chunk_length
    turns, turns_rest = load_frequencies(inv_freq_ptr, HEAD_DIM, BLOCK_D)
    cos, sin = cos_sin(delta[:, None], turns[None, :], turns_rest[None, :])
    store_rows(
        rotated_ptr + (token * stride_rt + head * stride_rh)[:, None] + pairs[None, :],
        rotate(x, cos, sin, BLOCK_M, BLOCK_D),
        row,
        length,
        pairs,
        HEAD_DIM,
        BLOCK_D,
    )


def dual_chunk_rotate(
    x: Tensor,
    cu_seqlens_x: Tensor,
    cu_seqlens_k: Tensor,
    tiles: Tensor,
    *,
    inv_freq: Tensor,
    chunk_length: int,
    far_position: int,
    is_query: bool,
) -> Tensor:
    """Launches dual_chunk_rotate_kernel.

    Args:
        x: [T, H, D] queries or keys, last stride 1.
        cu_seqlens_x: [N + 1] int32, the documents of x.
        cu_seqlens_k: [N + 1] int32.
        tiles: [n, 2] int32 of x's rows, from a TileSchedule.
        inv_freq: [D/2] float32.
        chunk_length: c.
        far_position: Where queries are rotated to.
        is_query: Rotate to the far position; otherwise back by c.

    Returns:
        [T, H, D] contiguous; rows of documents of at most c keys are not written.
    """
    tokens, heads, head_dim = x.shape
    rotated = torch.empty((tokens, heads, head_dim), dtype=x.dtype, device=x.device)
    grid = (heads * tiles.shape[0] * (SCHEDULE_ROWS // ROTATE_CONFIG.block_m),)
    if grid[0] > 0:
        dual_chunk_rotate_kernel[grid](
            x,
            rotated,
            cu_seqlens_x,
            cu_seqlens_k,
            tiles,
            inv_freq,
            x.stride(0),
            x.stride(1),
            rotated.stride(0),
            rotated.stride(1),
            tiles.shape[0],
            chunk_length,
            far_position,
            HEAD_DIM=head_dim,
            BLOCK_D=padded_head_dim(head_dim),
            BLOCK_M=ROTATE_CONFIG.block_m,
            IS_QUERY=is_query,
            **ROTATE_CONFIG.options,
        )
    return rotated
