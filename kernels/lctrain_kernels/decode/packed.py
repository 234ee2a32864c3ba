"""flash_attn_varlen_func over pages, or over a part of each document's keys: no gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lctrain_kernels.backend import select_backend
from lctrain_kernels.checks import check_qkv
from lctrain_kernels.decode.checks import (
    check_backend,
    check_no_gradients,
    check_numbers,
)
from lctrain_kernels.decode.operators import decode_attention
from lctrain_kernels.decode.packed_checks import check_pages, check_used
from lctrain_kernels.decode.structures import DecodeOptions, KVCache, NewTokens, PackedQueries
from lctrain_kernels.layout import unit_stride
from lctrain_kernels.options import check_head_tensors, check_softcap_and_scale, resolve_window
from lctrain_kernels.pack_checks import check_cu_seqlens, check_max_seqlen

FEW_QUERIES = 16
"""Most queries of a request for which its keys are split among programs."""


def packed_cache_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    block_table: Tensor | None,
    seqused_k: Tensor | None,
    *,
    softmax_scale: float | None,
    causal: bool,
    window_size: Sequence[int] | Tensor,
    softcap: float,
    alibi_slopes: Tensor | None,
    learnable_sink: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Computes attention of packed queries over pages, or over the first keys of documents.

    With max_seqlen_q up to FEW_QUERIES, the keys are split as in flash_attn_with_kvcache. Otherwise
    the order and the tile are those of the portable training kernel, and so are the bits. With a
    softcap on a GPU, both are equal up to rounding only.

    Args:
        q: Packed queries [T, H, D].
        k: Keys [pages, page, Hk, D] with a block_table, else packed [Tk, Hk, D].
        v: Values, in the shape of k.
        cu_seqlens_q: Cumulative numbers of queries, [N + 1] int32.
        cu_seqlens_k: Cumulative numbers of keys, [N + 1] int32; may be None with both block_table
            and seqused_k.
        max_seqlen_q: Largest number of queries of a document.
        max_seqlen_k: Largest number of keys of a document.
        block_table: Pages of each document, [N, pages per document] int32, or None.
        seqused_k: Number of keys of each document that are used, [N] int32; None for all.
        softmax_scale: Factor of q.k.
        causal: Whether a query sees only the keys up to its own position.
        window_size: (left, right) keys around a query's own position.
        softcap: Softcap c; 0 turns it off.
        alibi_slopes: ALiBi slopes, [H] or [N, H] float32, or None.
        learnable_sink: Logit of the attention sink of each head, [H], or None.
        backend: "auto", "triton" or "pytorch".

    Returns:
        out [T, H, D] in q's dtype and lse [H, T] float32.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if shapes, devices or values do not fit, or a gradient is required.
    """
    check_no_gradients(
        "flash_attn_varlen_func with block_table or seqused_k",
        "gather the keys into contiguous k and v, and pass neither",
        q=q,
        k=k,
        v=v,
        alibi_slopes=alibi_slopes,
        learnable_sink=learnable_sink,
    )
    check_backend(backend)
    if block_table is None:
        check_qkv(q, k, v)
        k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    else:
        check_pages(q, k, v)
        check_qkv(q, k.flatten(0, 1), v.flatten(0, 1))
    check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q.shape[0], q.device)
    check_max_seqlen("max_seqlen_q", max_seqlen_q)
    check_max_seqlen("max_seqlen_k", max_seqlen_k)
    check_numbers(window_size, q.device)
    check_softcap_and_scale(softcap, softmax_scale)
    documents, heads, head_dim = cu_seqlens_q.shape[0] - 1, q.shape[1], q.shape[2]
    check_head_tensors(documents, heads, q.device, alibi_slopes, learnable_sink)
    if cu_seqlens_k is not None:
        total_k = k.shape[0] if block_table is None else None
        check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, total_k, q.device)
    check_used(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table, seqused_k)
    _, left, right = resolve_window(window_size, causal)
    slopes, sink, cu_q, cu_k, used, table = unit_stride(
        alibi_slopes, learnable_sink, cu_seqlens_q, cu_seqlens_k, seqused_k, block_table
    )
    if used is None:
        used = cu_k.diff()
    if table is None:
        first = cu_k[:-1]
        rows = torch.zeros_like(first)
        cache = KVCache(k[None], v[None], first + used, batch_index=rows, leftpad=first)
    else:
        cache = KVCache(k, v, used, block_table=table)
    few = max_seqlen_q <= FEW_QUERIES
    options = DecodeOptions(
        softmax_scale=head_dim**-0.5 if softmax_scale is None else float(softmax_scale),
        window_left=left,
        window_right=right,
        softcap=float(softcap),
        alibi_slopes=slopes,
        learnable_sink=sink,
        split="fixed" if few else "exact",
    )
    return decode_attention(
        q,
        cache,
        NewTokens(),
        options,
        select_backend(q.device, q.dtype, backend, head_dim=head_dim),
        longest=max_seqlen_k,
        packed=PackedQueries(cu_q, max_seqlen_q),
    )
