"""attend_prefixes: the operator of dual chunk attention to prefixes that requests share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lctrain_kernels.decode.structures import KVCache, SharedPrefixes
from lctrain_kernels.fused_operator import define_operator


def attend_prefixes(
    q: Tensor,
    cache: KVCache,
    starts: Tensor,
    ends: Tensor,
    shared: SharedPrefixes,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    """Computes the attention of all queries to the shared prefixes of their requests, by kernels.

    Args:
        q: Queries [3, B, Sq, H, D], rotated for each range of keys.
        cache: Paged cache; its seqlens are the tokens of each request that its group computes.
        starts: First key of each query in each range, [3, B, Sq] integers.
        ends: Key after the last one, in the shape of starts.
        shared: Prefixes that requests share.
        softmax_scale: Factor of q.k.

    Returns:
        out [B, Sq, H, D] float32 and lse [B, H, Sq] float32; 0 and -inf for other requests.
    """
    ranges = (x.to(torch.int32).contiguous() for x in (starts, ends))
    pages = (cache.k, cache.v, cache.seqlens, cache.block_table)
    found: tuple[Tensor, Tensor] = _attend(q.contiguous(), *pages, *ranges, *shared, softmax_scale)
    return found


def _attend_here(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seqlens: Tensor,
    block_table: Tensor,
    starts: Tensor,
    ends: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    from lctrain_kernels.dual_chunk import prefix_launch

    *shared, softmax_scale = rest
    cache = KVCache(k, v, seqlens, block_table=block_table)
    prefixes = SharedPrefixes(*shared)
    return prefix_launch.attend_prefixes(q, cache, starts, ends, prefixes, softmax_scale)


def _attend_fake(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _, requests, seqlen_q, heads, _ = q.shape
    out = q.new_empty(q.shape[1:], dtype=torch.float32)
    return out, out.new_empty(requests, heads, seqlen_q)


_attend = define_operator(
    "dual_chunk_prefixes(Tensor q, Tensor k, Tensor v, Tensor seqlens, Tensor block_table, "
    "Tensor starts, Tensor ends, Tensor prefix, Tensor members, Tensor groups, "
    "SymInt longest_prefix, SymInt most_members, float softmax_scale) -> (Tensor, Tensor)",
    _attend_here,
    _attend_fake,
)
