"""make_shared_prefixes: finds requests that begin with the same pages, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lctrain_kernels.decode.structures import SharedPrefixes

PREFIX_MULTIPLE = 64
"""Shared prefixes have a multiple of this number of tokens: whole blocks of keys of every tile."""


def make_shared_prefixes(
    block_table: Tensor | Sequence[Sequence[int]],
    cache_seqlens: Tensor | Sequence[int],
    page: int,
    *,
    groups: Sequence[Sequence[int]] | None = None,
    min_tokens: int = PREFIX_MULTIPLE,
    device: torch.device | str | None = None,
) -> SharedPrefixes | None:
    """Returns the prefixes that requests share, for make_decode_plan; None if there are none.

    Requests share a prefix if their rows of the page table begin with the same pages. A prefix has
    pages that are full before the step, and a multiple of 64 tokens. Without `groups`, the groups
    are those that save the most keys; a request is in one group at most. The result depends on the
    page table only: make it anew when requests come or go, not in every step.

    Args:
        block_table: Page numbers of each request, [B, pages per request], on the CPU. Rows may have
            different lengths.
        cache_seqlens: Tokens that the cache holds of each request before the step, [B], on the CPU.
        page: Tokens of a page.
        groups: Requests of each group; the members of a group must share a page. By default, the
            groups are found.
        min_tokens: Shortest prefix that is worth a group.
        device: Device of the cache; the CPU by default. The copy does not synchronise.

    Raises:
        TypeError: if a tensor is not on the CPU.
        ValueError: if shapes or groups do not fit.
    """
    for name, given in (("block_table", block_table), ("cache_seqlens", cache_seqlens)):
        if isinstance(given, Tensor) and given.device.type != "cpu":
            raise TypeError(
                f"{name} must be on the CPU, got {given.device}. Keep the page table on the CPU, "
                "and copy it to the GPU."
            )
    stored = [int(tokens) for tokens in cache_seqlens]
    if page < 1 or len(block_table) != len(stored):
        raise ValueError(
            f"block_table must have a row per request ({len(stored)}) and pages of at least one "
            f"token, got {len(block_table)} rows and pages of {page}. Pass both of one cache."
        )
    rows = [
        torch.as_tensor(row, dtype=torch.int64)[: max(tokens, 0) // page]
        for row, tokens in zip(block_table, stored, strict=True)
    ]
    if groups is None:
        found = _best_groups(rows, list(range(len(rows))), page)[1]
    else:
        found = [
            (list(group), _shared_pages(rows, group) * page) for group in _checked(groups, rows)
        ]
    chosen = []
    for members, tokens in found:
        tokens -= tokens % PREFIX_MULTIPLE
        if len(members) > 1 and tokens >= max(min_tokens, 1):
            chosen.append((members, tokens))
    if not chosen:
        return None
    prefix = [0] * len(rows)
    members, table = [], []
    for group, tokens in chosen:
        table.append((len(members), len(group), tokens))
        members += group
        for request in group:
            prefix[request] = tokens
    target = torch.device("cpu" if device is None else device)
    return SharedPrefixes(
        prefix=_to_device(prefix, target),
        members=_to_device(members, target),
        groups=_to_device(table, target),
        longest=max(prefix),
        most=max(len(group) for group, _ in chosen),
    )


def _checked(groups: Sequence[Sequence[int]], rows: list[Tensor]) -> Sequence[Sequence[int]]:
    """Returns the groups; raises unless they name requests, and each request once at most."""
    named = [request for group in groups for request in group]
    wrong = [request for request in named if not 0 <= request < len(rows)]
    twice = [request for request in set(named) if named.count(request) > 1]
    if wrong or twice:
        raise ValueError(
            f"groups must name requests from 0 to {len(rows) - 1}, each once, got "
            f"{[*wrong, *twice][0]}{' twice' if not wrong else ''}. Name the rows of block_table."
        )
    return [group for group in groups if group]


def _shared_pages(rows: list[Tensor], members: Sequence[int]) -> int:
    """Returns the number of leading pages that all members have in common."""
    first = rows[members[0]]
    count = min(len(rows[request]) for request in members)
    for request in members[1:]:
        different = (rows[request][:count] != first[:count]).nonzero()
        if len(different):
            count = int(different[0])
    return count


def _best_groups(
    rows: list[Tensor], members: list[int], page: int
) -> tuple[int, list[tuple[list[int], int]]]:
    """Returns the groups among some requests that save the most keys: (keys saved, groups).

    A group is its requests and the tokens of its prefix. All members are one group, or are divided
    by the first page that differs.

    Args:
        rows: Full pages of each request.
        members: Requests to group.
        page: Tokens of a page.
    """
    if len(members) < 2:
        return 0, []
    pages = _shared_pages(rows, members)
    tokens = pages * page - pages * page % PREFIX_MULTIPLE
    together = tokens * (len(members) - 1), [(members, tokens)]
    parts: dict[int, list[int]] = {}
    for request in members:
        if len(rows[request]) > pages:
            parts.setdefault(int(rows[request][pages]), []).append(request)
    divided = [_best_groups(rows, part, page) for part in parts.values() if len(part) > 1]
    saved = sum(keys for keys, _ in divided)
    if together[0] >= saved:
        return together
    return saved, [group for _, found in divided for group in found]


def _to_device(values: Sequence[object], device: torch.device) -> Tensor:
    tensor = torch.tensor(values, dtype=torch.int32)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
