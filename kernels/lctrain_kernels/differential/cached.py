"""diff_attn_with_kvcache: differential attention of new queries over a cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lctrain_kernels.decode.call import checked_call
from lctrain_kernels.decode.checks import check_no_gradients, check_numbers
from lctrain_kernels.decode.operators import append_tokens, decode_attention
from lctrain_kernels.decode.plan_checks import check_plan, check_shared_pages
from lctrain_kernels.decode.structures import DecodeOptions, DecodePlan, NewTokens
from lctrain_kernels.options import check_softcap_and_scale, resolve_window


def diff_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lam: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = True,
    window_size: Sequence[int] = (-1, -1),
    *,
    halves: bool = False,
    plan: DecodePlan | None = None,
    max_seqlen_k: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Appends new keys and values to a cache, and computes differential attention over it.

    diff_attn_varlen_func describes the attention, and flash_attn_with_kvcache the cache and the
    masks. Both branches are heads of one launch of the decode kernels; their float32 results are
    subtracted. The call has no backward.

    Shapes: B requests, Sq queries each, H heads (pairs of branches), Hk key/value heads, head dim
    D.

    Args:
        q: Queries [B, Sq, 2 H, D]. Heads 2 h and 2 h + 1 are the branches of head h; with `halves`,
            heads h and h + H.
        k_cache: Keys [rows, S, Hk, D], or [pages, page, Hk, D] with a block_table. Both branches
            read the same heads; with `halves`, branch 1 reads the first half of the heads and
            branch 2 the second.
        v_cache: Values, in the shape of k_cache. With `halves`, heads g and g + Hk / 2 are one
            value of width 2 D for both branches.
        lam: Lambda, floating point: a scalar, [H] or [B, Sq, H].
        k: New keys [B, S_new, Hk, D], or None.
        v: New values [B, S_new, Hk, D], given with k.
        cache_seqlens: Tokens that the cache holds before the call, [B] int32, one int, or None for
            a full cache.
        cache_batch_idx: Row of k_cache of each request, [B] int32.
        cache_leftpad: First token of each request in the cache, [B] int32; 0 by default.
        block_table: Page numbers of each request, [B, pages per request] int32.
        softmax_scale: Factor of q.k; D^-0.5 by default.
        causal: Whether a query sees only the keys up to its own position.
        window_size: (left, right) keys around a query's own position; -1 is unbounded.
        halves: Whether heads are paired as in version 1 of the differential transformer, in the
            layout of transformers' DiffLlama, instead of version 2.
        plan: Plan of make_decode_plan, made once per step for all layers, as for
            flash_attn_with_kvcache.
        max_seqlen_k: Upper bound of the lengths after the call, a Python int.
        backend: "auto", "triton" or "pytorch".

    Returns:
        out [B, Sq, H, D], or [B, Sq, H, 2 D] with `halves`, in q's dtype.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if shapes, devices or values do not fit, or a gradient is required.
    """
    check_no_gradients(
        "diff_attn_with_kvcache",
        "train with diff_attn_varlen_func",
        **{"q": q, "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v, "lam": lam},
    )
    new = NewTokens(k, v)
    call = checked_call(
        *(q, k_cache, v_cache, new, cache_seqlens, cache_batch_idx, cache_leftpad, block_table),
        *(max_seqlen_k, backend),
    )
    check_numbers(window_size, q.device)
    check_softcap_and_scale(0.0, softmax_scale)
    heads, head_dim = q.shape[2] // 2, q.shape[3]
    _check_branches(q, k_cache, lam, halves)
    _, left, right = resolve_window(window_size, causal)
    if plan is not None:
        check_plan(plan, q, call.cache, new, left)
        check_shared_pages(plan.shared, call.cache)
    append_tokens(call.cache, new, call.backend)
    if halves:
        q = torch.cat([branch for branch in q.chunk(2, 2) for _ in range(2)], 2)
    out, _ = decode_attention(
        q,
        call.cache,
        new,
        DecodeOptions(
            head_dim**-0.5 if softmax_scale is None else float(softmax_scale),
            window_left=left,
            window_right=right,
            wide=True,
            halves=halves,
        ),
        call.backend,
        plan=plan,
        longest=call.longest,
    )
    if halves:  # [B, Sq, branch, half of the value, H, D]
        branches = out.unflatten(2, (2, 2, heads)).transpose(3, 4).flatten(4).unbind(2)
    else:
        branches = out.unflatten(2, (heads, 2)).unbind(3)
    return (branches[0] - lam.to(out.dtype)[..., None] * branches[1]).to(q.dtype)


def _check_branches(q: Tensor, k_cache: Tensor, lam: Tensor, halves: bool) -> None:
    heads, heads_kv = q.shape[2], k_cache.shape[2]
    if heads % 2 or (halves and heads_kv % 2) or (not halves and heads // heads_kv % 2):
        raise ValueError(
            f"heads must form pairs that share their keys, got {heads} query heads and {heads_kv} "
            f"key/value heads with halves={halves}. Check the layout [B, S, H, D]."
        )
    shapes = ((), (heads // 2,), (q.shape[0], q.shape[1], heads // 2))
    if not isinstance(lam, Tensor) or not lam.is_floating_point():
        raise TypeError("lam must be a floating-point tensor. Pass a scalar, [H] or [B, Sq, H].")
    if lam.device != q.device:
        raise ValueError(f"lam must be on q's device, {q.device}, got {lam.device}. Move it.")
    if tuple(lam.shape) not in shapes:
        raise ValueError(
            f"lam must be a scalar, [{heads // 2}] or {list(shapes[2])}, got {tuple(lam.shape)}. "
            "Pass one number per head, or per query and head."
        )
