"""Launches the kernel that lists the splits of a decode step."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from lctrain_kernels.decode.structures import DecodePlan, SharedPrefixes
from lctrain_kernels.decode.triton_plan import decode_plan_kernel
from lctrain_kernels.launch import launch

PLAN_SPLITS = 128
"""Entries that a program of decode_plan_kernel writes at a time."""


def fill_plan(
    seqlens: Tensor,
    leftpad: Tensor | None,
    capacity: int,
    split_size: int,
    *,
    seqlen_q: int = 1,
    new_tokens: int = 0,
    window_left: int = -1,
    longest: int | None = None,
    shared: SharedPrefixes | None = None,
) -> DecodePlan:
    """Launches decode_plan_kernel, without a synchronisation, and returns the plan.

    The shapes and the grid depend on no device value, so a CUDA graph can capture the call.

    Args:
        seqlens: Tokens stored before the call, [B] int32.
        leftpad: Padding on the left, [B] int32, or None.
        capacity: Most tokens of a request.
        split_size: Keys of a split.
        seqlen_q: Queries of a request.
        new_tokens: Tokens that a call appends to each request.
        window_left: Visible keys before a query's own position; -1 is unbounded.
        longest: Upper bound of the keys of a request, new tokens included; the capacity by default.
        shared: Prefixes that several requests share; None for none.
    """
    requests = seqlens.shape[0]
    keys = capacity if longest is None else min(longest, capacity)
    max_splits = max(1, triton.cdiv(keys, split_size))
    if shared is not None:
        max_splits += 1  # the prefix and the keys after it may end in one split each
    work = torch.zeros(1 + requests * max_splits, dtype=torch.int32, device=seqlens.device)
    plan = DecodePlan(
        *(work, max_splits, split_size, seqlen_q, new_tokens, window_left),
        has_leftpad=leftpad is not None,
        shared=shared,
    )
    if requests:
        launch(decode_plan_kernel, (requests,))(
            seqlens,
            leftpad,
            None if shared is None else shared.prefix,
            work,
            requests,
            seqlen_q,
            new_tokens,
            capacity,
            window_left if window_left >= 0 else None,
            split_size,
            max_splits,
            REQUESTS=triton.next_power_of_2(requests),
            SPLITS=PLAN_SPLITS,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return plan
