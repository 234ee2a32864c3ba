"""Argument checks of plans and shared prefixes. Each error message names the remedy."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lctrain_kernels.checks import reads_values
from lctrain_kernels.decode.checks import check_longest
from lctrain_kernels.decode.structures import DecodePlan, KVCache, NewTokens, SharedPrefixes


def check_sizes(sizes: Mapping[str, object], dtype: object, longest: object) -> None:
    """Raises unless the sizes of a plan are ints, and its dtype is one of torch.

    Args:
        sizes: Sizes by name; new_tokens may be 0, the others are at least 1.
        dtype: Dtype of queries and cache.
        longest: max_seqlen_k of the plan.
    """
    for name, value in sizes.items():
        least = 0 if name == "new_tokens" else 1
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(
                f"{name} must be an int of at least {least}, got {value!r}. Pass the Python int of "
                "this step."
            )
    check_longest(longest)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype, got {dtype!r}. Pass that of the cache.")


def check_plan(plan: DecodePlan, q: Tensor, cache: KVCache, new: NewTokens, left: int) -> None:
    """Raises unless a plan lists all splits that a call needs.

    Args:
        plan: Plan of the call.
        q: Queries [B, Sq, H, D].
        cache: Cache of the call.
        new: New tokens of the call.
        left: Visible keys before a query's own position; -1 is unbounded. The plan may have more.
    """
    if not isinstance(plan, DecodePlan):
        raise TypeError(
            f"plan must be a DecodePlan or None, got {type(plan).__name__}. Pass the result of "
            "make_decode_plan."
        )
    requests = q.shape[0]
    if plan.work.device != q.device:
        raise ValueError(
            f"plan must be on the device of q, {q.device}, got {plan.work.device}. Make it from "
            "the lengths on that device."
        )
    planned = (plan.work.numel() - 1) // plan.max_splits
    for name, made, called in (
        ("requests", planned if plan.max_splits > 1 else requests, requests),
        ("seqlen_q", plan.seqlen_q, q.shape[1]),
        ("new_tokens", plan.new_tokens, new.tokens),
        ("cache_leftpad", plan.has_leftpad, cache.leftpad is not None),
    ):
        if made != called:
            raise ValueError(
                f"plan must have the {name} of the call, {called}, got {made}. Pass {name} to "
                "make_decode_plan, and make a plan in every step."
            )
    if plan.shared is not None and cache.block_table is None:
        raise ValueError(
            "block_table must be given with a plan of shared prefixes, got None. Make the plan "
            "without shared_prefixes for a dense cache."
        )
    if plan.window_left >= 0 and not 0 <= left <= plan.window_left:
        raise ValueError(
            f"plan must have a left window of at least the call's, {left}, got "
            f"{plan.window_left}. Make one plan without a window for layers that differ."
        )
    if requests and reads_values(q.device):
        pads = 0 if cache.leftpad is None else cache.leftpad
        most = int((cache.seqlens - pads).max()) + new.tokens
        planned = plan.max_splits * plan.split_size
        if most > planned:
            raise ValueError(
                f"plan must be for requests of {most} keys, got one for {planned}. Pass capacity "
                "and max_seqlen_k of this step to make_decode_plan, and make a plan in every step."
            )
        _check_lengths("cache_seqlens", plan.seqlens, cache.seqlens)
        _check_lengths("cache_leftpad", plan.leftpad, cache.leftpad)


def _check_lengths(name: str, planned: Tensor | None, called: Tensor | None) -> None:
    """Raises if the lengths that a plan was made for, if known, are not those of the call."""
    if planned is None or called is None or torch.equal(planned, called):
        return
    if planned.shape != called.shape:
        made, wanted = f"{len(planned)} requests", str(len(called))
    else:
        request = int((planned != called).nonzero()[0])
        made, wanted = f"{int(planned[request])} for request {request}", str(int(called[request]))
    raise ValueError(
        f"plan must have the {name} of the call, {wanted}, got {made}. Make a plan in every step, "
        "before its tokens are appended."
    )


def check_shared(
    shared: SharedPrefixes, requests: int, device: torch.device, has_leftpad: bool
) -> None:
    """Raises unless shared prefixes are those of this number of requests, without padding.

    Args:
        shared: Prefixes that several requests share.
        requests: Number of requests B.
        device: Device of the cache.
        has_leftpad: Whether requests have padding on the left.
    """
    if not isinstance(shared, SharedPrefixes):
        raise TypeError(
            f"shared_prefixes must be SharedPrefixes or None, got {type(shared).__name__}. Pass "
            "the result of make_shared_prefixes."
        )
    if shared.prefix.shape != (requests,) or shared.prefix.device != device:
        raise ValueError(
            f"shared_prefixes must be for {requests} requests on {device}, got "
            f"{tuple(shared.prefix.shape)} on {shared.prefix.device}. Make them from the rows of "
            "this batch, with device=."
        )
    if has_leftpad:
        raise ValueError(
            "cache_leftpad must be None with shared_prefixes, got a tensor. Pages hold no padding "
            "that requests could share."
        )


def check_shared_pages(shared: SharedPrefixes | None, cache: KVCache) -> None:
    """Raises unless the members of each group have the pages of its prefix in common."""
    if shared is None or not reads_values(cache.seqlens.device):
        return
    assert cache.block_table is not None
    members = shared.members.tolist()
    for first, count, tokens in shared.groups.tolist():
        if count == 0:  # room for a group in the buffers of a CUDA graph
            continue
        group = members[first : first + count]
        pages = -(-tokens // cache.page)
        leader = cache.block_table[group[0], :pages]
        for request in group:
            stored = int(cache.seqlens[request])
            same = torch.equal(cache.block_table[request, :pages], leader)
            if stored >= 0 and (stored < tokens or not same):
                raise ValueError(
                    f"shared_prefixes must hold for block_table and cache_seqlens, got {tokens} "
                    f"tokens that request {request} does not share with request {group[0]}. Make "
                    "them from the page table of this step."
                )
