"""make_decode_plan: lists the splits of a decode step once, for all layers of the step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lctrain_kernels.backend import select_backend
from lctrain_kernels.checks import reads_values
from lctrain_kernels.decode.checks import check_int32, check_numbers
from lctrain_kernels.decode.plan_checks import check_shared, check_sizes
from lctrain_kernels.decode.structures import DecodePlan, SharedPrefixes
from lctrain_kernels.layout import unit_stride
from lctrain_kernels.options import resolve_window


@torch._disable_dynamo
def make_decode_plan(
    cache_seqlens: Tensor,
    capacity: int,
    head_dim: int,
    dtype: torch.dtype,
    *,
    seqlen_q: int = 1,
    new_tokens: int = 1,
    causal: bool = True,
    window_size: Sequence[int] = (-1, -1),
    cache_leftpad: Tensor | None = None,
    max_seqlen_k: int | None = None,
    shared_prefixes: SharedPrefixes | None = None,
) -> DecodePlan:
    """Returns the plan of flash_attn_with_kvcache for a step, without a synchronisation.

    The splits are listed on the device: programs are started for splits that exist, not for the
    capacity. A CUDA graph can capture the call; the plan is then made anew in every replay. A plan
    of other lengths may leave out splits. On a CPU, and on a GPU with LCTRAIN_CHECK_CACHE=1, a call
    with such a plan is a ValueError.

    Args:
        cache_seqlens: Tokens that the cache holds before the step, [B] int32.
        capacity: Most tokens of a request in the cache.
        head_dim: Head dim D.
        dtype: Dtype of queries and cache.
        seqlen_q: Queries of each request in the step.
        new_tokens: Tokens that the step appends to each request.
        causal: Whether a query sees only the keys up to its own position.
        window_size: (left, right) keys around a query's own position; -1 is unbounded.
        cache_leftpad: First token of each request in the cache, [B] int32, or None.
        max_seqlen_k: Upper bound of the lengths after the step, a Python int.
        shared_prefixes: Result of make_shared_prefixes, for a paged cache: the pages that several
            requests share are read once for all of them. The results are those without it up to
            rounding; they depend on the group. With split="exact", and where one program computes
            all keys of a request, nothing is shared.

    Raises:
        TypeError: if cache_seqlens or cache_leftpad is not an int32 tensor, dtype is none of
            torch, or shared_prefixes is no result of make_shared_prefixes.
        ValueError: if a size does not fit.
    """
    if not isinstance(cache_seqlens, Tensor):
        got = type(cache_seqlens).__name__
        raise TypeError(f"cache_seqlens must be an int32 tensor [B], got {got}. Convert it.")
    device = cache_seqlens.device
    for name, vector in (("cache_seqlens", cache_seqlens), ("cache_leftpad", cache_leftpad)):
        if vector is not None:
            check_int32(name, vector, device)
            if vector.dim() != 1 or len(vector) != len(cache_seqlens):
                raise ValueError(
                    f"{name} must have shape [B], one number per request, got "
                    f"{tuple(vector.shape)}. Flatten it."
                )
    sizes = {"capacity": capacity, "seqlen_q": seqlen_q, "head_dim": head_dim}
    check_sizes(sizes | {"new_tokens": new_tokens}, dtype, max_seqlen_k)
    check_numbers(window_size, cache_seqlens.device)
    if shared_prefixes is not None:
        check_shared(shared_prefixes, len(cache_seqlens), device, cache_leftpad is not None)
    _, left, _ = resolve_window(window_size, causal)
    if select_backend(device, dtype, head_dim=head_dim, warn=False) == "pytorch":
        work = torch.zeros(1, dtype=torch.int32, device=device)
        padded = cache_leftpad is not None
        plan = DecodePlan(work, 1, capacity, seqlen_q, new_tokens, left, padded, shared_prefixes)
        return _with_lengths(plan, cache_seqlens, cache_leftpad)
    from lctrain_kernels.decode.launch_config import decode_config
    from lctrain_kernels.decode.launch_plan import fill_plan

    config = decode_config(torch.empty(0, 1, 1, head_dim, dtype=dtype, device=device))
    seqlens, leftpad = unit_stride(cache_seqlens, cache_leftpad)
    plan = fill_plan(
        seqlens,
        leftpad,
        capacity,
        config.split_size,
        seqlen_q=seqlen_q,
        new_tokens=new_tokens,
        window_left=left,
        longest=max_seqlen_k,
        shared=shared_prefixes,
    )
    return _with_lengths(plan, cache_seqlens, cache_leftpad)


def _with_lengths(plan: DecodePlan, seqlens: Tensor, leftpad: Tensor | None) -> DecodePlan:
    """Returns a plan with a copy of its lengths, where the checks of a call read values."""
    if not reads_values(seqlens.device):
        return plan
    pads = None if leftpad is None else leftpad.clone()
    return plan._replace(seqlens=seqlens.clone(), leftpad=pads)
