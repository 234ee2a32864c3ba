"""make_shared_prefixes: finds requests that begin with the same pages, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from lctrain_kernels.decode.structures import SharedPrefixes
from lctrain_kernels.lengths import read_lengths

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
        TypeError: if a tensor is not on the CPU, or the lengths are no integers.
        ValueError: if shapes or groups do not fit.
    """
    if isinstance(block_table, Tensor) and block_table.device.type != "cpu":
        raise TypeError(
            f"block_table must be on the CPU, got {block_table.device}. Keep the page table on the "
            "CPU, and copy it to the GPU."
        )
    if not isinstance(block_table, Sequence | Tensor):
        raise TypeError(
            f"block_table must be a tensor or lists of page numbers, got "
            f"{type(block_table).__name__}. Pass one row per request."
        )
    stored = read_lengths("cache_seqlens", cache_seqlens).tolist()
    if not isinstance(page, int) or page < 1 or len(block_table) != len(stored):
        raise ValueError(
            f"block_table must have a row per request ({len(stored)}) and pages of at least one "
            f"token, got {len(block_table)} rows and pages of {page}. Pass both of one cache."
        )
    if not isinstance(min_tokens, int) or isinstance(min_tokens, bool):
        raise ValueError(
            f"min_tokens must be an int, got {min_tokens!r}. Pass a number of tokens, or leave it "
            "out."
        )
    rows = [_full_pages(i, row, stored[i], page) for i, row in enumerate(block_table)]
    for request, pages in enumerate(rows):
        if len(pages) and int(pages.min()) < 0:
            raise ValueError(
                f"block_table[{request}] must name pages of at least 0, got {int(pages.min())} "
                f"among the first {len(pages)}. Allocate a page."
            )
    if groups is None:
        found = _best_groups(rows, page)
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


def _full_pages(request: int, row: Tensor | Sequence[int], stored: int, page: int) -> Tensor:
    """Returns the pages of a request that are full; raises unless its row names all its pages."""
    given = torch.as_tensor(row)
    if given.dim() != 1 or (len(given) and (given.is_floating_point() or given.is_complex())):
        raise TypeError(
            f"block_table[{request}] must be a list of page numbers, which are integers, got "
            f"{given.dtype} of shape {tuple(given.shape)}. Pass one row per request."
        )
    needed = -(-max(stored, 0) // page)
    if len(given) < needed:
        raise ValueError(
            f"block_table[{request}] must name the {needed} pages of {stored} tokens, got "
            f"{len(given)}. Pass the lengths before the step, and all pages of a request."
        )
    return given[: max(stored, 0) // page].long()


def _checked(groups: Sequence[Sequence[int]], rows: list[Tensor]) -> Sequence[Sequence[int]]:
    """Returns the groups; raises unless they name requests, and each request once at most."""
    lists = isinstance(groups, Sequence) and all(isinstance(one, Sequence) for one in groups)
    if not lists or not all(isinstance(request, int) for one in groups for request in one):
        raise TypeError(
            f"groups must be lists of requests, which are ints, got {groups!r}. Write [[0, 1]], or "
            "leave it out."
        )
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


class _Part(NamedTuple):
    """Requests, and the groups among them that save the most keys.

    Attributes:
        members: Requests of the part, in any order.
        saved: Keys that its groups save.
        groups: Requests and tokens of the prefix of each group.
    """

    members: list[int]
    saved: int
    groups: list[tuple[list[int], int]]


def _best_groups(rows: list[Tensor], page: int) -> list[tuple[list[int], int]]:
    """Returns the groups that save the most keys: their requests, and the tokens of the prefix.

    Rows in lexicographic order form a tree of parts that share ever more pages. `open_parts` has
    its branch to the row at hand: a number of pages, and the finished parts that share them.

    Args:
        rows: Full pages of each request.
        page: Tokens of a page.
    """
    order = sorted(range(len(rows)), key=lambda request: rows[request].tolist())
    open_parts: list[tuple[int, list[_Part]]] = []
    part = _Part([], 0, [])
    for before, request in pairwise([*order, None]):
        assert before is not None
        part = _Part([before], 0, [])
        pages = -1 if request is None else _shared_pages(rows, (before, request))
        while open_parts and open_parts[-1][0] > pages:
            shared, parts = open_parts.pop()
            part = _joined([*parts, part], shared * page)
        if open_parts and open_parts[-1][0] == pages:
            open_parts[-1][1].append(part)
        elif request is not None:
            open_parts.append((pages, [part]))
    return sorted(part.groups)


def _joined(parts: list[_Part], tokens: int) -> _Part:
    """Returns parts that share a number of tokens as one: one group, or the groups of the parts."""
    members = [request for part in parts for request in part.members]
    tokens -= tokens % PREFIX_MULTIPLE
    together = tokens * (len(members) - 1)
    saved = sum(part.saved for part in parts)
    if together >= saved:
        return _Part(members, together, [(sorted(members), tokens)])
    return _Part(members, saved, [group for part in parts for group in part.groups])


def _to_device(values: Sequence[object], device: torch.device) -> Tensor:
    tensor = torch.tensor(values, dtype=torch.int32)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
