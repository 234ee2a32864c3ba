"""Launches the decode kernels: append, attention by splits or as a whole, prefixes, and merge."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from lctrain_kernels.decode.launch_config import decode_config, exact_config
from lctrain_kernels.decode.launch_plan import fill_plan
from lctrain_kernels.decode.structures import (
    DecodeOptions,
    DecodePlan,
    KVCache,
    NewTokens,
    PackedQueries,
)
from lctrain_kernels.decode.triton_append import (
    AppendPointers,
    AppendStrides,
    decode_append_kernel,
)
from lctrain_kernels.decode.triton_attention import decode_split_kernel, decode_whole_kernel
from lctrain_kernels.decode.triton_merge import MergePointers, decode_merge_kernel
from lctrain_kernels.decode.triton_prefix import GroupPointers, decode_prefix_kernel
from lctrain_kernels.decode.triton_tile import (
    DecodeFlags,
    DecodePointers,
    DecodeShape,
    DecodeStrides,
)
from lctrain_kernels.launch import launch
from lctrain_kernels.multiprocessors import multiprocessors
from lctrain_kernels.tile.arguments import DOT_PRECISION, alibi_strides, padded_head_dim
from lctrain_kernels.tile.config import TileConfig
from lctrain_kernels.tile.mask import UNBOUNDED

APPEND_TOKENS, APPEND_WARPS, MERGE_WARPS = 16, 4, 1
MOST_PARTIAL_BYTES = 2**29
"""Most memory for the results of splits; a call that needs more computes requests as a whole."""


def append_tokens(cache: KVCache, new: NewTokens) -> None:
    """Launches decode_append_kernel: writes the new keys, rotated, and values into the cache.

    Args:
        cache: Cache, before the new tokens.
        new: New tokens; nothing is launched without any.
    """
    k, v = new.k, new.v
    if k is None or v is None or k.numel() == 0:
        return
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    requests, tokens, heads_kv, head_dim = k.shape
    tile = TileConfig(0, 0, APPEND_WARPS, 1)
    grid = (requests * triton.cdiv(tokens, APPEND_TOKENS) * heads_kv,)
    launch(decode_append_kernel, grid)(
        AppendPointers(
            k,
            v,
            cache.k,
            cache.v,
            cache.seqlens,
            cache.batch_index,
            cache.block_table,
            new.cos,
            new.sin,
        ),
        AppendStrides._make((*_strides(k, v, cache.k, cache.v), _table_stride(cache))),
        tokens,
        cache.capacity,
        cache.k.shape[0],
        heads_kv,
        _rotary_rows(new),
        TILE=decode_shape(tile, head_dim, 1, cache, new),
        FLAGS=DecodeFlags(False, False, False, new.interleaved, False),
        TOKENS=APPEND_TOKENS,
        num_warps=APPEND_WARPS,
        enable_fp_fusion=True,
    )


def decode_attention(
    q: Tensor,
    cache: KVCache,
    new: NewTokens,
    options: DecodeOptions,
    plan: DecodePlan | None = None,
    longest: int | None = None,
    packed: PackedQueries | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes the attention of queries over a cache that holds the new tokens already.

    Args:
        q: Queries [B, Sq, H, D], or [T, H, D] if packed; last stride 1.
        cache: Cache; its seqlens do not count the new tokens.
        new: New tokens.
        options: Mask, scale and the other options.
        plan: List of the splits; None computes split i of every request up to the longest.
        longest: Upper bound of the keys of a request; the capacity by default.
        packed: Numbers of queries, if packed.

    Returns:
        out in the shape of q, in its dtype or with options.wide in float32; lse [B, H, Sq], or [H,
        T] if packed, float32.
    """
    heads, head_dim = q.shape[-2:]
    heads_kv = cache.k.shape[2] * (2 if options.halves else 1)
    group = heads // heads_kv
    dtype = torch.float32 if options.wide else q.dtype
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    if packed is None:
        requests, seqlen_q = q.shape[:2]
        lse = torch.empty((requests, heads, seqlen_q), dtype=torch.float32, device=q.device)
    else:
        requests, seqlen_q = packed.requests, packed.longest
        lse = torch.empty((heads, q.shape[0]), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    exact = options.split == "exact"
    config = decode_config(q)
    tile = exact_config(q, group) if exact else config.tile
    size = config.split_size
    if options.num_splits > 1:
        blocks = triton.cdiv(cache.capacity, options.num_splits * tile.block_n)
        size = blocks * tile.block_n
        plan = None  # a plan has the fixed size
    if plan is not None:
        size = plan.split_size
    elif (longest is None or packed is not None) and not exact and options.num_splits != 1:
        plan = fill_plan(
            cache.seqlens,
            cache.leftpad,
            cache.capacity,
            size,
            seqlen_q=seqlen_q,
            new_tokens=new.tokens,
            window_left=options.window_left,
            longest=longest,
        )
    shared = None if plan is None else plan.shared
    keys = cache.capacity if longest is None else min(longest, cache.capacity)
    max_splits = max(1, triton.cdiv(keys, size)) if plan is None else plan.max_splits
    rows = seqlen_q * group
    row_tiles = triton.cdiv(rows, tile.block_m)
    pieces = requests * heads_kv * row_tiles
    shape = decode_shape(tile, head_dim, group, cache, new, config.prefetch_pages)
    shape = shape._replace(halves=options.halves)
    has_left, has_right = options.window_left >= 0, options.window_right >= 0
    flags = DecodeFlags(
        has_left, has_right, options.softcap > 0, new.interleaved, options.rotates_each
    )
    window = (
        options.window_left if has_left else UNBOUNDED,
        options.window_right if has_right else UNBOUNDED,
    )
    partial = stats = None
    whole = exact or options.num_splits == 1 or max_splits == 1
    if not whole:
        many = row_tiles > 1 and pieces > 4 * multiprocessors(q.device)
        results = requests * max_splits * heads_kv * rows
        whole = many or 4 * results * head_dim > MOST_PARTIAL_BYTES
    if not whole:
        sizes = (requests, max_splits, heads_kv, rows)
        partial = torch.empty((*sizes, head_dim), dtype=torch.float32, device=q.device)
        stats = torch.empty((*sizes, 2), dtype=torch.float32, device=q.device)
    work = None if plan is None or whole else plan.work
    if whole:
        shared = None
    cu_seqlens_q = None if packed is None else packed.cu_seqlens
    prefix = None if shared is None else shared.prefix
    pointers = DecodePointers(
        q,
        cache.k,
        cache.v,
        out if whole else None,
        lse if whole else None,
        partial,
        stats,
        cache.seqlens,
        cache.batch_index,
        cache.leftpad,
        cache.block_table,
        cu_seqlens_q,
        prefix,
        work,
        new.cos,
        new.sin,
        options.alibi_slopes,
        options.learnable_sink if whole else None,
    )
    strides = cache_strides(q if packed is None else q[None], cache)
    common: tuple[Any, ...] = (
        pointers,
        strides,
        alibi_strides(options.alibi_slopes),
        seqlen_q,
        new.tokens,
        cache.capacity,
        heads_kv,
        _rotary_rows(new),
        *window,
        size,
    )
    constants = {"TILE": shape, "FLAGS": flags, "PRECISION": DOT_PRECISION, **tile.options}
    if whole:
        has_splits = not (exact or options.num_splits == 1)
        launch(decode_whole_kernel, (pieces,))(
            *common,
            lse.stride(-2),
            options.softmax_scale,
            options.softcap,
            1.0,
            HAS_SPLITS=has_splits,
            **constants,
        )
        return out, lse
    if shared is not None:
        most = shared.most * rows
        prefix_tile = config.tile_of_rows(most)
        shape_of_prefix = decode_shape(
            prefix_tile, head_dim, group, cache, new, config.prefetch_pages
        )._replace(halves=options.halves)
        row_tiles = triton.cdiv(most, prefix_tile.block_m)
        splits = triton.cdiv(shared.longest, size)
        programs = shared.groups.shape[0] * splits * row_tiles * heads_kv
        launch(decode_prefix_kernel, (programs,))(
            pointers,
            GroupPointers(shared.members, shared.groups),
            *common[1:],
            max_splits,
            row_tiles,
            splits,
            options.softmax_scale,
            options.softcap,
            **{**constants, "TILE": shape_of_prefix, **prefix_tile.options},
        )
    pieces *= max_splits
    if work is not None:
        pieces = min(pieces, config.programs * multiprocessors(q.device))
    launch(decode_split_kernel, (pieces,))(
        *common,
        max_splits,
        requests * max_splits,
        options.softmax_scale,
        options.softcap,
        **constants,
    )
    blocks = triton.cdiv(rows, config.merge_rows)
    launch(decode_merge_kernel, (requests * heads_kv * blocks,))(
        MergePointers(
            partial,
            stats,
            out,
            lse,
            cache.seqlens,
            cache.leftpad,
            cu_seqlens_q,
            prefix,
            options.learnable_sink,
        ),
        seqlen_q,
        new.tokens,
        cache.capacity,
        heads_kv,
        *window,
        size,
        lse.stride(-2),
        max_splits,
        1.0,
        TILE=shape._replace(prefetch=False, halves=False),
        FLAGS=flags,
        ROWS=config.merge_rows,
        UNROLL=config.merge_unroll,
        num_warps=MERGE_WARPS,
        enable_fp_fusion=True,
    )
    return out, lse


def decode_shape(
    tile: TileConfig,
    head_dim: int,
    group: int,
    cache: KVCache,
    new: NewTokens,
    prefetch: bool = False,
) -> DecodeShape:
    """Returns the compile-time sizes of a launch.

    Args:
        tile: Tile configuration.
        head_dim: Head dim D.
        group: Number of query heads per key/value head.
        cache: Cache of the call.
        new: New tokens of the call.
        prefetch: Whether page numbers are loaded one tile ahead.
    """
    page = cache.page
    scattered = page > 0 and (
        cache.leftpad is not None or tile.block_n == 0 or page % tile.block_n != 0
    )
    return DecodeShape(
        head_dim=head_dim,
        block_d=padded_head_dim(head_dim),
        group=group,
        block_m=tile.block_m,
        block_n=tile.block_n,
        page=page,
        rotary=new.rotary,
        scattered=scattered,
        prefetch=prefetch and page > 0,
    )


def cache_strides(q: Tensor, cache: KVCache) -> DecodeStrides:
    """Returns the strides of queries [B, Sq, H, D] and of a cache, for the attention kernels."""
    return DecodeStrides._make((*_strides(q, cache.k, cache.v), _table_stride(cache)))


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    """Returns the strides of pages or batch, tokens and heads of each tensor, in order."""
    return tuple(stride for tensor in tensors for stride in tensor.stride()[:3])


def _table_stride(cache: KVCache) -> int:
    return 0 if cache.block_table is None else cache.block_table.stride(0)


def _rotary_rows(new: NewTokens) -> int:
    return 0 if new.cos is None else new.cos.shape[0]
