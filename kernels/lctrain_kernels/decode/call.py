"""checked_call: the arguments of a call over a cache that all attentions have in common."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lctrain_kernels.backend import select_backend
from lctrain_kernels.decode.checks import (
    check_backend,
    check_bound,
    check_longest,
    check_metadata,
    check_new_tokens,
    check_stored,
    check_tensors,
)
from lctrain_kernels.decode.structures import KVCache, NewTokens
from lctrain_kernels.layout import unit_stride


class Call(NamedTuple):
    """Cache, new tokens and implementation of a call.

    Attributes:
        cache: Cache, before the new tokens.
        new: New tokens.
        longest: Upper bound of the keys of a request after the call; None for the capacity.
        backend: "pytorch", or another name for the kernels.
    """

    cache: KVCache
    new: NewTokens
    longest: int | None
    backend: str


def checked_call(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    new: NewTokens,
    cache_seqlens: int | Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    block_table: Tensor | None,
    max_seqlen_k: int | None,
    backend: str,
) -> Call:
    """Checks arguments that flash_attn_with_kvcache describes, and returns them.

    Args:
        q: Queries [B, Sq, H, D].
        k_cache: Keys of the cache.
        v_cache: Values of the cache.
        new: New tokens, with the tables of their rotation.
        cache_seqlens: Tokens that the cache holds before the call.
        cache_batch_idx: Row of each request, or None.
        cache_leftpad: First token of each request, or None.
        block_table: Pages of each request, or None.
        max_seqlen_k: Upper bound of the lengths after the call, or None.
        backend: "auto", "triton" or "pytorch".

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if shapes, devices or values do not fit.
    """
    check_backend(backend)
    check_tensors(q, k_cache, v_cache)
    new = new._replace(**dict(zip(("cos", "sin"), unit_stride(new.cos, new.sin), strict=True)))
    check_new_tokens(q, k_cache, new, cache_seqlens is not None)
    check_longest(max_seqlen_k)
    cache = KVCache(k_cache, v_cache, q, cache_batch_idx, cache_leftpad, block_table)
    longest = max_seqlen_k
    if not isinstance(cache_seqlens, Tensor):
        stored = cache.capacity if cache_seqlens is None else cache_seqlens
        check_stored(stored, cache.capacity, new.tokens)
        check_bound(max_seqlen_k, stored + new.tokens, "all requests")
        longest = stored + new.tokens if longest is None else longest
        cache_seqlens = torch.full((q.shape[0],), stored, dtype=torch.int32, device=q.device)
    cache = cache._replace(seqlens=cache_seqlens)
    check_metadata(q, cache, new, max_seqlen_k)
    vectors = unit_stride(cache.seqlens, cache_batch_idx, cache_leftpad, block_table)
    serving = select_backend(q.device, q.dtype, backend, head_dim=q.shape[3])
    return Call(KVCache(k_cache, v_cache, *vectors), new, longest, serving)
