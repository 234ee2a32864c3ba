"""Launches the kernels of prefixes that requests share: attention by splits, and the merge."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from lctrain_kernels.decode.launch import (
    MERGE_WARPS,
    MOST_PARTIAL_BYTES,
    cache_strides,
    decode_shape,
)
from lctrain_kernels.decode.launch_config import decode_config
from lctrain_kernels.decode.structures import KVCache, NewTokens, SharedPrefixes
from lctrain_kernels.decode.triton_merge import MergePointers, decode_merge_kernel
from lctrain_kernels.decode.triton_prefix import GroupPointers
from lctrain_kernels.decode.triton_tile import DecodeFlags, DecodePointers
from lctrain_kernels.dual_chunk.triton_prefix import RangePointers, dual_chunk_prefix_kernel
from lctrain_kernels.launch import launch
from lctrain_kernels.tile.arguments import DOT_PRECISION
from lctrain_kernels.tile.mask import UNBOUNDED

BY_RANGE = DecodeFlags(
    has_left=True, has_right=True, has_softcap=False, interleaved=True, rotates_each=False
)
MERGE_ALL = BY_RANGE._replace(has_left=False, has_right=False)


def attend_prefixes(
    q: Tensor,
    cache: KVCache,
    starts: Tensor,
    ends: Tensor,
    shared: SharedPrefixes,
    softmax_scale: float,
    most_bytes: int = MOST_PARTIAL_BYTES,
) -> tuple[Tensor, Tensor]:
    """Computes the attention of all queries to the shared prefixes of their requests.

    The splits of a prefix are merged in their order. The shapes and the grids depend on no device
    value, so a CUDA graph can capture the call.

    Args:
        q: Queries [3, B, Sq, H, D], rotated for each range of keys; contiguous.
        cache: Paged cache; its seqlens are the tokens of each request that its group computes.
        starts: First key of each query in each range, [3, B, Sq] int32; contiguous.
        ends: Key after the last one, in the shape of starts.
        shared: Prefixes that requests share.
        softmax_scale: Factor of q.k.
        most_bytes: Most memory for the results of splits, which are longer if they need more.

    Returns:
        out [B, Sq, H, D] float32 and lse [B, H, Sq] float32; 0 and -inf for other requests.
    """
    _, requests, seqlen_q, heads, head_dim = q.shape
    heads_kv = cache.k.shape[2]
    group = heads // heads_kv
    rows = seqlen_q * group
    out = torch.empty((requests, seqlen_q, heads, head_dim), dtype=torch.float32, device=q.device)
    lse = torch.empty((requests, heads, seqlen_q), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    config = decode_config(q)
    size, bytes_of_split = config.split_size, 4 * requests * heads_kv * rows * head_dim
    while size < shared.longest and triton.cdiv(shared.longest, size) * bytes_of_split > most_bytes:
        size *= 2
    splits = triton.cdiv(shared.longest, size)
    most = shared.most * rows
    tile = config.tile_of_rows(most)
    shape = decode_shape(tile, head_dim, group, cache, NewTokens(), config.prefetch_pages)
    row_tiles = triton.cdiv(most, tile.block_m)
    results = (requests, splits, heads_kv, rows)
    partial = torch.empty((*results, head_dim), dtype=torch.float32, device=q.device)
    stats = torch.empty((*results, 2), dtype=torch.float32, device=q.device)
    none = DecodePointers._make([None] * len(DecodePointers._fields))
    launch(dual_chunk_prefix_kernel, (shared.groups.shape[0] * splits * row_tiles * heads_kv,))(
        none._replace(
            q=q, k=cache.k, v=cache.v, partial=partial, stats=stats, block_table=cache.block_table
        ),
        GroupPointers(shared.members, shared.groups),
        RangePointers(starts, ends),
        cache_strides(q.flatten(0, 1), cache),
        requests,
        seqlen_q,
        heads_kv,
        size,
        splits,
        row_tiles,
        splits,
        softmax_scale,
        TILE=shape,
        FLAGS=BY_RANGE,
        PRECISION=DOT_PRECISION,
        **tile.options,
    )
    launch(decode_merge_kernel, (requests * heads_kv * triton.cdiv(rows, config.merge_rows),))(
        MergePointers(partial, stats, out, lse, cache.seqlens, None, None, cache.seqlens, None),
        seqlen_q,
        0,
        cache.capacity,
        heads_kv,
        UNBOUNDED,
        UNBOUNDED,
        size,
        lse.stride(-2),
        splits,
        1.0,
        TILE=decode_shape(config.tile, head_dim, group, cache, NewTokens()),
        FLAGS=MERGE_ALL,
        ROWS=config.merge_rows,
        UNROLL=config.merge_unroll,
        num_warps=MERGE_WARPS,
        enable_fp_fusion=True,
    )
    return out, lse
