"""Decode attention in plain PyTorch: the path of CPUs and of dtypes without kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from lctrain_kernels.decode.structures import DecodeOptions, KVCache, NewTokens, PackedQueries
from lctrain_kernels.reference.attention import dense_attention


def append_tokens(cache: KVCache, new: NewTokens) -> None:
    """Writes the new keys, rotated, and values into the cache, in place.

    Args:
        cache: Cache, before the new tokens.
        new: New tokens.
    """
    if new.k is None or new.v is None:
        return
    for request, stored in enumerate(cache.seqlens.tolist()):
        if stored < 0:  # a request without keys
            continue
        positions = torch.arange(stored, stored + new.tokens, device=new.k.device)
        page, slot = cache_places(cache, request, positions)
        cache.k[page, slot] = rotate(new.k[request], positions, new)
        cache.v[page, slot] = new.v[request]


def decode_attention(
    q: Tensor,
    cache: KVCache,
    new: NewTokens,
    options: DecodeOptions,
    packed: PackedQueries | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes the attention of queries over a cache that holds the new tokens already.

    Args:
        q: Queries [B, Sq, H, D], or [T, H, D] if packed.
        cache: Cache; its seqlens do not count the new tokens.
        new: New tokens.
        options: Mask, scale and the other options.
        packed: Numbers of queries, if packed.

    Returns:
        out in the shape of q, in its dtype or with options.wide at least float32; lse [B, H, Sq],
        or [H, T] if packed, in float32, or float64 for a q of float64.
    """
    rows = list(q) if packed is None else list(q.split(packed.cu_seqlens.diff().tolist()))
    slopes = options.alibi_slopes
    compute = torch.promote_types(q.dtype, torch.float32) if options.wide else q.dtype
    leftpads = [0] * len(rows) if cache.leftpad is None else cache.leftpad.tolist()
    outs, lses = [], []
    for request, stored in enumerate(cache.seqlens.tolist()):
        keys = torch.arange(leftpads[request], stored + new.tokens, device=q.device)
        page, slot = cache_places(cache, request, keys)
        queries = torch.arange(len(rows[request]), device=q.device)
        positions = stored + queries * options.rotates_each
        k, v = cache.k[page, slot], cache.v[page, slot]
        if options.halves:
            k = torch.cat([half for half in k.chunk(2, 1) for _ in range(2)], 1)
            v = v.repeat(1, 2, 1)
        operands = (rotate(rows[request], positions, new), k, v)
        out, lse, _ = dense_attention(
            *(x.to(compute) for x in operands),
            softmax_scale=options.softmax_scale,
            window=(options.window_left, options.window_right),
            softcap=options.softcap,
            alibi_slopes=slopes[request] if slopes is not None and slopes.dim() == 2 else slopes,
            learnable_sink=options.learnable_sink,
        )
        outs.append(out)
        lses.append(lse)
    if not outs:
        shape = (0, q.shape[2], q.shape[1]) if packed is None else (q.shape[1], 0)
        return torch.empty_like(q, dtype=compute), q.new_empty(shape, dtype=torch.float32)
    if packed is not None:
        return torch.cat(outs), torch.cat(lses, 1)
    return torch.stack(outs), torch.stack(lses)


def cache_places(cache: KVCache, request: int, index: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (page, slot) of tokens of a request in the cache, each in the shape of index.

    Args:
        cache: Cache.
        request: Index of the request.
        index: Indices of the tokens in the request, padding on the left counted.
    """
    if cache.block_table is not None:
        return cache.block_table[request, index // cache.page].long(), index % cache.page
    row = request if cache.batch_index is None else int(cache.batch_index[request])
    return torch.full_like(index, row), index


def rotate(x: Tensor, positions: Tensor, new: NewTokens) -> Tensor:
    """Rotates the first columns of x [S, heads, D] by positions [S], in at least float32.

    Args:
        x: Queries or keys of one request.
        positions: Position of each token; those without a row in the tables are not rotated.
        new: New tokens, with the tables.
    """
    if new.cos is None or new.sin is None:
        return x
    wide = torch.promote_types(x.dtype, torch.float32)
    at = positions.clamp(0, new.cos.shape[0] - 1)
    known = (at == positions)[:, None, None]
    cos, sin = (table[at].to(wide)[:, None] for table in (new.cos, new.sin))
    cos, sin = torch.where(known, cos, 1.0), torch.where(known, sin, 0.0)
    turned, rest = x[..., : new.rotary].to(wide), x[..., new.rotary :]
    if new.interleaved:
        low, high = turned[..., ::2], turned[..., 1::2]
    else:
        low, high = turned.chunk(2, -1)
    pair = (low * cos - high * sin, high * cos + low * sin)
    joined = torch.stack(pair, -1).flatten(-2) if new.interleaved else torch.cat(pair, -1)
    return torch.cat((joined.to(x.dtype), rest), -1)
