"""The kernel that lists the splits of all requests of a decode step."""

import triton
import triton.language as tl

from lctrain_kernels.decode.triton_tile import (
    RUNTIME_INTEGERS,
    request_bounds,
    shared_tokens,
    slot_range,
)


@triton.jit
def _slots(
    seqlens_ptr,
    leftpad_ptr,
    prefix_ptr,
    request,
    seqlen_q,
    new_tokens,
    capacity,
    left,
    size,
    most,
):
    """Returns (first slot, number of slots) of each request [N], without a shared prefix's."""
    _, _, length = request_bounds(seqlens_ptr, leftpad_ptr, request, new_tokens, capacity)
    prefix = shared_tokens(prefix_ptr, request)
    low = prefix
    if left is not None:
        low = tl.maximum(length - seqlen_q - left, prefix)
    first, end = slot_range(low, tl.maximum(length, prefix), prefix, size)
    return first, tl.maximum(tl.minimum(end, most) - first, 0)


@triton.jit(do_not_specialize=[*RUNTIME_INTEGERS, "requests"])
def decode_plan_kernel(
    seqlens_ptr,
    leftpad_ptr,
    prefix_ptr,
    work_ptr,
    requests,
    seqlen_q,
    new_tokens,
    capacity,
    window_left,
    split_size,
    max_splits,
    REQUESTS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Writes the list of splits: their number, then request * max_splits + slot of each.

    The grid has one axis: requests. Program b writes the splits of request b, after those of the
    requests before it.

    Args:
        seqlens_ptr: Tokens stored before the call, [B] int32.
        leftpad_ptr: Padding on the left, [B] int32, or None.
        prefix_ptr: Tokens of each request whose splits are not listed, [B] int32, or None.
        work_ptr: The list, [1 + B * max_splits] int32.
        requests: Number of requests B.
        seqlen_q: Queries of a request.
        new_tokens: Tokens that the call appends to each request.
        capacity: Most tokens of a request.
        window_left: Visible keys before a query's own position; None is unbounded.
        split_size: Keys of a split.
        max_splits: Splits of a request, at most.
        REQUESTS: Power of two >= B.
        SPLITS: Entries that a program writes at a time.
    """
    request = tl.program_id(0)
    every = tl.arange(0, REQUESTS)
    known = tl.minimum(every, requests - 1)
    _, counts = _slots(
        seqlens_ptr,
        leftpad_ptr,
        prefix_ptr,
        known,
        seqlen_q,
        new_tokens,
        capacity,
        window_left,
        split_size,
        max_splits,
    )
    begin = tl.sum(tl.where(every < request, counts, 0), 0)
    total = tl.sum(tl.where(every < requests, counts, 0), 0)
    first, count = _slots(
        seqlens_ptr,
        leftpad_ptr,
        prefix_ptr,
        request,
        seqlen_q,
        new_tokens,
        capacity,
        window_left,
        split_size,
        max_splits,
    )
    tl.store(work_ptr, total, mask=request == 0)
    for start in tl.range(0, count, SPLITS):
        index = start + tl.arange(0, SPLITS)
        item = request * max_splits + first + index
        tl.store(work_ptr + 1 + begin + index, item, mask=index < count)
