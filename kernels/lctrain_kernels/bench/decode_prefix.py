"""Times requests that share a prefix, with and without computing it once for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lctrain_kernels import flash_attn_with_kvcache, make_decode_plan, make_shared_prefixes
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
    tokens = shape.requests * shape.keys
    size = (copies, tokens, shape.heads_kv, shape.head_dim)
    k, v = (torch.empty(size, dtype=dtype, device=device).normal_() for _ in range(2))
    q = torch.randn(shape.requests, 1, shape.heads, shape.head_dim, dtype=dtype, device=device)
    lengths = torch.full((shape.requests,), shape.keys, dtype=torch.int32)
    on_device = lengths.to(device)
    for layout in layouts:
        page = LAYOUTS[layout]
        if page == 0:
            continue
        own, same = tables(shape, page)
        shared = make_shared_prefixes(same, lengths, page, device=device)
        for config in configs:
            times: dict[str, float] = {}
            expected = None
            for name, table, prefixes in (
                *((OWN, own, None), (SAME, same, None)),
                (SHARED, same, shared),
            ):
                result: dict[str, Any] = {"layout": layout, "contender": name}
                try:
                    with override_decode_config(config):
                        plan = make_decode_plan(
                            *(on_device, shape.keys, shape.head_dim, dtype),
                            new_tokens=0,
                            shared_prefixes=prefixes,
                        )
                        calls = [
                            partial(
                                flash_attn_with_kvcache,
                                q,
                                *(side[copy].unflatten(0, (-1, page)) for side in (k, v)),
                                cache_seqlens=on_device,
                                block_table=table.to(device),
                                causal=True,
                                plan=plan,
                                max_seqlen_k=shape.keys,
                            )
                            for copy in range(copies)
                        ]
                        if name == SAME:
                            expected = calls[0]().float()
                        elif name == SHARED and expected is not None:
                            difference = float((calls[0]().float() - expected).norm())
                            if not difference < MAX_DIFFERENCE * float(expected.norm()):
                                raise ArithmeticError(f"differs from {SAME} by {difference:.1e}")
                        milliseconds = times[name] = time_calls(calls, timer)
                except Exception as error:  # record the error and time the others
                    result["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                else:
                    result["microseconds"] = round(1000 * milliseconds, 2)
                    read = shape.requests * shape.keys * 4 * shape.heads_kv * shape.head_dim
                    read = shape.cache_bytes if name == SHARED else read
                    result["bytes_per_s"] = read / milliseconds * 1000
                    if name == SHARED and OWN in times:
                        result["speedup"] = round(times[OWN] / milliseconds, 2)
                yield result
