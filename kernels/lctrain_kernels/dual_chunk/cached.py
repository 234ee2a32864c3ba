"""dual_chunk_attn_with_kvcache: dual chunk attention of new queries over a cache."""

from __future__ import annotations

import torch
from torch import Tensor

from lctrain_kernels.decode.call import checked_call
from lctrain_kernels.decode.checks import check_no_gradients
from lctrain_kernels.decode.operators import append_tokens, decode_attention
from lctrain_kernels.decode.plan_checks import check_plan, check_shared_pages
from lctrain_kernels.decode.structures import (
    DecodeOptions,
    DecodePlan,
    KVCache,
    NewTokens,
    PackedQueries,
)
from lctrain_kernels.dual_chunk.checks import check_chunks
from lctrain_kernels.dual_chunk.prefixes import attend_prefixes
from lctrain_kernels.dual_chunk.reference import DualChunkGeometry
from lctrain_kernels.options import check_softcap_and_scale


def dual_chunk_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    *,
    inv_freq: Tensor,
    chunk_size: int,
    local_size: int,
    logit_scale: Tensor | None = None,
    softmax_scale: float | None = None,
    return_softmax_lse: bool = False,
    plan: DecodePlan | None = None,
    max_seqlen_k: int | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Appends new keys and values to a cache in place, and computes dual chunk attention over it.

    dual_chunk_attn_varlen_func describes the attention, and flash_attn_with_kvcache the cache.
    Queries are the last positions of their request. A query and one of its three ranges of keys are
    a request of the decode kernels, so that one launch reads each key once per query. The ranges
    are merged by lse, in the order of the keys. The call has no backward.

    A shared prefix may lie in other ranges of each request of its group. One more launch computes
    it: every query has a rotation and a range of its own there, so its keys are read once for all
    requests whose queries are in one chunk. Where a group crosses the border of a chunk, the keys
    of the chunks that its requests see in different ranges are read once per range.

    Shapes: B requests, Sq queries each, H query heads, Hk key/value heads, head dim D.

    Args:
        q: Queries [B, Sq, H, D], rotated by RoPE at position mod (chunk_size - local_size), counted
            from the request's first key.
        k_cache: Keys [rows, S, Hk, D], or [pages, page, Hk, D] with a block_table, rotated in the
            same way.
        v_cache: Values, in the shape of k_cache.
        k: New keys [B, S_new, Hk, D], rotated, or None.
        v: New values [B, S_new, Hk, D], given with k.
        cache_seqlens: Tokens that the cache holds before the call, [B] int32, one int, or None for
            a full cache.
        cache_batch_idx: Row of k_cache of each request, [B] int32.
        cache_leftpad: First token of each request in the cache, [B] int32; 0 by default.
        block_table: Page numbers of each request, [B, pages per request] int32.
        inv_freq: RoPE frequencies of q and k, [D / 2] float32, in radians per position.
        chunk_size: Largest relative position S.
        local_size: Distance L, 0 <= L < S, up to which positions stay exact across a chunk
            boundary.
        logit_scale: Positive factor of the logits of each request, [B] float32, or None.
        softmax_scale: Factor of q.k; D^-0.5 by default.
        return_softmax_lse: Whether to return (out, lse).
        plan: Plan of make_decode_plan for this step, of which the shared prefixes are used.
        max_seqlen_k: Upper bound of the lengths after the call, a Python int.
        backend: "auto", "triton" or "pytorch".

    Returns:
        out [B, Sq, H, D] in q's dtype; with return_softmax_lse also lse [B, H, Sq] float32.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if shapes, devices or values do not fit, or a gradient is required.
    """
    check_no_gradients(
        "dual_chunk_attn_with_kvcache",
        "train with dual_chunk_attn_varlen_func",
        **{"q": q, "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v},
    )
    new = NewTokens(k, v)
    call = checked_call(
        *(q, k_cache, v_cache, new, cache_seqlens, cache_batch_idx, cache_leftpad, block_table),
        *(max_seqlen_k, backend),
    )
    requests, seqlen_q, heads, head_dim = q.shape
    check_chunks(chunk_size, local_size, inv_freq, logit_scale, head_dim, requests, q.device)
    check_softcap_and_scale(0.0, softmax_scale)
    if plan is not None:
        check_plan(plan, q, call.cache, new, -1)
        check_shared_pages(plan.shared, call.cache)
    append_tokens(call.cache, new, call.backend)
    geometry = DualChunkGeometry(chunk_size, local_size)
    starts, ends, deltas = _ranges(call.cache, new.tokens, seqlen_q, geometry)
    wide = torch.promote_types(q.dtype, torch.float32)
    turned = _rotated(q.to(wide), deltas, inv_freq.to(wide))
    if logit_scale is not None:
        turned = turned * logit_scale.to(wide)[:, None, None, None]
    turned = turned.to(q.dtype)
    softmax_scale = head_dim**-0.5 if softmax_scale is None else float(softmax_scale)
    before = None
    if plan is not None and plan.shared is not None and call.backend != "pytorch":
        held = torch.minimum(plan.shared.prefix, call.cache.seqlens.clamp(min=0))
        prefixes = call.cache._replace(seqlens=held)
        before = attend_prefixes(turned, prefixes, starts, ends, plan.shared, softmax_scale)
        starts = torch.maximum(starts, held[:, None])
        ends = torch.maximum(ends, starts)
    count = starts.numel()
    request = torch.arange(requests, device=q.device)[:, None].expand(starts.shape).flatten()
    cache = call.cache
    rows = request.int() if cache.batch_index is None else cache.batch_index[request]
    table = None if cache.block_table is None else cache.block_table[request]
    out, lse = decode_attention(
        turned.view(count, heads, head_dim),
        KVCache(
            *(cache.k, cache.v, ends.flatten().int()),
            batch_index=rows if table is None else None,
            leftpad=starts.flatten().int(),
            block_table=table,
        ),
        NewTokens(),
        DecodeOptions(softmax_scale, wide=True),
        call.backend,
        longest=cache.capacity if call.longest is None else call.longest,
        packed=PackedQueries(torch.arange(count + 1, dtype=torch.int32, device=q.device), 1),
    )
    out, lse = out.view(*starts.shape, heads, head_dim), lse.view(heads, *starts.shape)
    if before is not None:
        out = torch.cat((before[0][None], out))
        lse = torch.cat((before[1].transpose(0, 1)[:, None], lse), 1)
    out, lse = _merged(out, lse)
    out = out.to(q.dtype)
    return (out, lse) if return_softmax_lse else out


def _ranges(
    cache: KVCache, new_tokens: int, seqlen_q: int, geometry: DualChunkGeometry
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns where the ranges of keys begin and end in the cache, and the rotation of the query.

    Returns:
        Three tensors [3, B, Sq] int64: first key, key after the last one, and the positions by
        which the query is rotated, for the earlier chunks, the chunk before, and its own.
    """
    pads = 0 if cache.leftpad is None else cache.leftpad[:, None].long()
    stored = cache.seqlens[:, None].long() + new_tokens
    steps = torch.arange(seqlen_q, device=stored.device)
    position = stored - pads - seqlen_q + steps
    begin = position.clamp(min=0) // geometry.length * geometry.length
    place = position - begin
    before = torch.where(
        place >= geometry.succ_length, begin, (begin - geometry.length).clamp(min=0)
    )
    none = torch.zeros_like(begin)
    starts = torch.stack((none, before, begin))
    ends = torch.maximum(torch.stack((before, begin, position + 1)), starts)
    deltas = torch.stack((geometry.inter_position - place, none + geometry.length, none))
    return starts + pads, ends + pads, deltas


def _rotated(x: Tensor, deltas: Tensor, inv_freq: Tensor) -> Tensor:
    """Returns x [B, Sq, H, D] rotated by deltas [3, B, Sq] positions: [3, B, Sq, H, D]."""
    angles = (deltas.to(x.dtype)[..., None] * inv_freq)[..., None, :]
    cos, sin = angles.cos(), angles.sin()
    low, high = x.chunk(2, -1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)


def _merged(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merges parts of keys: out [n, B, Sq, H, D], lse [H, n, B, Sq] to [B, Sq, H, D], [B, H, Sq].

    A query without keys has out = 0 and lse = -inf.
    """
    highest = lse.amax(1, keepdim=True)
    highest = highest.masked_fill(highest == float("-inf"), 0.0)
    weights = (lse - highest).exp()
    total = weights.sum(1)
    share = weights / total.masked_fill(total == 0, 1.0)[:, None]
    merged = (out * share.permute(1, 2, 3, 0)[..., None]).sum(0)
    return merged, (highest[:, 0] + total.log()).transpose(0, 1)
