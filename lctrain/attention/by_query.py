"""Causal attention in PyTorch whose bits of a query depend on its keys only.

PyTorch's path multiplies many queries at once, in an order that depends on their number. Here every
query is a call of its own. It is the path of CPUs for batch-invariant models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def attends_by_query(q: Tensor, backend: str) -> bool:
    """Returns whether the kernels' PyTorch path would compute the attention of q [T, H, D]."""
    from lctrain.kernels import select_backend

    serving = select_backend(q.device, q.dtype, backend, head_dim=q.shape[-1], warn=False)
    return serving == "pytorch"


def attend_by_query(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths_q: Sequence[int],
    lengths_k: Sequence[int],
    options: dict[str, Any],
) -> Tensor:
    """Returns the causal attention of packed documents, [T, H, D], one query at a time.

    Args:
        q: Queries [T, H, D].
        k: Keys [Tk, Hk, D].
        v: Values [Tk, Hk, D].
        lengths_q: Queries of each document, its last ones.
        lengths_k: Keys of each document; a query without a key gets zeros.
        options: Keyword arguments of flash_attn_varlen_func: scale, softcap, window and sink.
    """
    from lctrain.kernels import flash_attn_varlen_func

    options = {**options, "backend": "pytorch"}
    one = torch.tensor([0, 1], dtype=torch.int32, device=q.device)
    outs, query, first = [], 0, 0
    for queries, keys in zip(lengths_q, lengths_k, strict=True):
        for seen in range(keys - queries + 1, keys + 1):
            if seen <= 0:
                outs.append(torch.zeros_like(q[:1]))
                query += 1
                continue
            cu_seqlens_k = torch.tensor([0, seen], dtype=torch.int32, device=q.device)
            out = flash_attn_varlen_func(
                q[query : query + 1].clone(),
                k[first : first + seen].clone(),
                v[first : first + seen].clone(),
                one,
                cu_seqlens_k,
                1,
                seen,
                causal=True,
                **options,
            )
            assert isinstance(out, Tensor)
            outs.append(out)
            query += 1
        first += keys
    return torch.cat(outs) if outs else torch.zeros_like(q)


def attend_pages_by_query(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    block_table: Tensor,
    options: dict[str, Any],
) -> Tensor:
    """Returns the attention of one query per request over pages, [B, 1, H, D]; zero without keys.

    Args:
        q: Queries [B, 1, H, D].
        k_cache: Pages of keys [pages, page, Hk, D], the new ones among them.
        v_cache: Pages of values, in the shape of k_cache.
        lengths: Keys of each request, [B] int32.
        block_table: Page numbers of each request, [B, pages per request] int32.
        options: See attend_by_query.
    """
    page, out = k_cache.shape[1], torch.zeros_like(q)
    for row, keys in enumerate(lengths.tolist()):
        index = torch.arange(keys, device=q.device)
        place = (block_table[row, index // page].long(), index % page)
        out[row] = attend_by_query(q[row], k_cache[place], v_cache[place], [1], [keys], options)
    return out
