"""Times requests that share a prefix, with and without computing it once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lctrain_kernels import (
    SharedPrefixes,
    flash_attn_with_kvcache,
    make_decode_plan,
    make_shared_prefixes,
)
from lctrain_kernels.bench.decode_shapes import (
    COLD_BYTES,
    LAYOUTS,
    MAX_DIFFERENCE,
    OURS,
    DecodeShape,
    time_calls,
)
from lctrain_kernels.decode.launch_config import DecodeConfig, override_decode_config

OWN, SAME, SHARED = f"{OURS}_own_pages", f"{OURS}_same_pages", f"{OURS}_shared"
"""Every request has pages of its own; all have the same pages of the prefix, which each reads; the
same pages, read once."""


def tables(shape: DecodeShape, page: int) -> tuple[Tensor, Tensor]:
    """Returns the page tables [B, pages] int32 on the CPU: own pages, and shared ones.

    Args:
        shape: Sizes of the case.
        page: Tokens of a page.
    """
    width = shape.keys // page
    own = torch.randperm(shape.requests * width).view(shape.requests, width).to(torch.int32)
    shared = own.clone()
    shared[:, : shape.prefix // page] = own[0, : shape.prefix // page]
    return own, shared


def calls_of(
    tensors: tuple[Tensor, Tensor, Tensor],
    lengths: Tensor,
    table: Tensor,
    page: int,
    prefixes: SharedPrefixes | None,
) -> list[Callable[[], Tensor]]:
    """Returns calls of the attention, one per copy of the cache; the plan is made beforehand.

    Args:
        tensors: Queries [B, 1, H, D]; keys and values [copies, tokens, Hk, D].
        lengths: Keys of each request, [B] int32.
        table: Pages of each request, [B, pages per request] int32.
        page: Tokens of a page.
        prefixes: Prefixes that are computed once; None for none.
    """
    q, k, v = tensors
    capacity = table.shape[1] * page
    plan = make_decode_plan(
        lengths, capacity, q.shape[-1], q.dtype, new_tokens=0, shared_prefixes=prefixes
    )

    def call(keys: Tensor, values: Tensor) -> Tensor:
        out = flash_attn_with_kvcache(
            q,
            keys,
            values,
            cache_seqlens=lengths,
            block_table=table,
            causal=True,
            plan=plan,
            max_seqlen_k=capacity,
        )
        assert isinstance(out, Tensor)
        return out

    return [
        partial(call, keys.unflatten(0, (-1, page)), values.unflatten(0, (-1, page)))
        for keys, values in zip(k, v, strict=True)
    ]


def measure_prefix(
    shape: DecodeShape,
    layouts: Sequence[str],
    configs: Sequence[DecodeConfig],
    device: torch.device,
    timer: Any,
) -> Iterator[dict[str, Any]]:
    """Times the contenders OWN, SAME and SHARED on paged caches.

    Args:
        shape: Sizes of the case.
        layouts: Layouts of the cache, keys of LAYOUTS; a dense one is left out.
        configs: Configurations of the kernels.
        device: Device of the tensors.
        timer: Function that returns the milliseconds of a call.

    Yields:
        One result per contender and layout. bytes_per_s counts the bytes that a call must read:
        shared keys once. "speedup" of SHARED is the time of OWN over its own.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    copies = max(1, -(-COLD_BYTES // shape.cache_bytes)) if device.type == "cuda" else 1
    size = (copies, shape.requests * shape.keys, shape.heads_kv, shape.head_dim)
    k, v = (torch.empty(size, dtype=dtype, device=device).normal_() for _ in range(2))
    q = torch.randn(shape.requests, 1, shape.heads, shape.head_dim, dtype=dtype, device=device)
    lengths = torch.full((shape.requests,), shape.keys, dtype=torch.int32)
    separate = shape.cache_bytes_of(prefix=0)
    for layout in layouts:
        page = LAYOUTS[layout]
        if page == 0:
            continue
        own, same = tables(shape, page)
        shared = make_shared_prefixes(same, lengths, page, device=device)
        for config in configs:
            times: dict[str, float] = {}
            expected = torch.empty(0)
            for name, table in ((OWN, own), (SAME, same), (SHARED, same)):
                result: dict[str, Any] = {"layout": layout, "contender": name}
                try:
                    with override_decode_config(config):
                        prefixes = shared if name == SHARED else None
                        calls = calls_of(
                            (q, k, v), lengths.to(device), table.to(device), page, prefixes
                        )
                        found = calls[0]().float()
                        if name == SHARED:
                            difference = float((found - expected).norm() / expected.norm())
                            if not difference < MAX_DIFFERENCE:
                                raise ArithmeticError(f"differs from {SAME} by {difference:.1e}")
                        expected = found
                        milliseconds = times[name] = time_calls(calls, timer)
                except Exception as error:  # record the error and time the others
                    result["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                else:
                    result["microseconds"] = round(1000 * milliseconds, 2)
                    read = shape.cache_bytes if name == SHARED else separate
                    result["bytes_per_s"] = read / milliseconds * 1000
                    if name == SHARED and OWN in times:
                        result["speedup"] = round(times[OWN] / milliseconds, 2)
                yield result
