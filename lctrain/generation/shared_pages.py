"""SharedPages: finds the pages that running requests have in common, if reading them once pays.

PrefixBuffers: the shared prefixes of a batch, in buffers that a CUDA graph reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lctrain.generation.pages import PAGE, CacheShape, PagePool

if TYPE_CHECKING:
    from lctrain_kernels import SharedPrefixes

FIXED_BYTES = 58_000_000
"""Bytes of keys and values that a layer could read in the time that its kernel of prefixes costs.

Both figures fit the two groups of bench/results/decode/*-prefix.json, of 16 and 64 requests behind
16,384 tokens: beyond its reads, a layer took 9 us and 1.06 us per request longer with the kernel.
The bytes are those that the same requests read in this time without it, at most 6.2 TB/s with the
help of the L2 cache."""
MEMBER_SHARE = 0.1
"""Share of the bytes of its prefix that a request costs in a group; it saves all of them."""

LEAST_TOKENS = 1024
"""Smallest bound of a prefix."""


class PrefixBounds(NamedTuple):
    """Sizes of the shared prefixes that a captured step serves.

    Attributes:
        groups: Most groups.
        members: Most requests of a group.
        tokens: Most tokens of a prefix.
    """

    groups: int
    members: int
    tokens: int


class SharedPages:
    """Finds the groups of requests whose first pages a decode step reads once for all of them.

    Args:
        sharing: "auto", "always" or "never". "auto" is for CUDA devices, and for groups that save
            more time than they cost.
        pool: Pages.
        device: Device of the pages.
    """

    def __init__(self, sharing: str, pool: PagePool, device: torch.device) -> None:
        self._pool = pool
        self._finds = sharing == "always" or (sharing == "auto" and device.type == "cuda")
        self._must_pay = sharing == "auto"
        self._version = -1
        self._found: SharedPrefixes | None = None

    def find(self, version: int, stored: Sequence[int], tables: Tensor) -> SharedPrefixes | None:
        """Returns the groups, on the CPU; None if there are none that pay.

        Pages that are full stay the same while a request runs, so groups change with the running
        requests only.

        Args:
            version: Number that is another one if other requests run.
            stored: Tokens of each running request in the cache.
            tables: Pages of each request, [n, width] int32, on the CPU.
        """
        if not self._finds:
            return None
        if version != self._version:
            self._version, self._found = version, self._search(stored, tables)
        return self._found

    def _search(self, stored: Sequence[int], tables: Tensor) -> SharedPrefixes | None:
        first = tables[:, 0].tolist()
        used = (page for page, tokens in zip(first, stored, strict=True) if tokens)
        if not any(map(self._pool.is_shared, used)):
            return None
        from lctrain_kernels import make_shared_prefixes

        found = make_shared_prefixes(tables, stored, PAGE)
        if found is None or (self._must_pay and not pays(found, self._pool.shape)):
            return None
        return found


def pays(shared: SharedPrefixes, shape: CacheShape) -> bool:
    """Returns whether a layer saves more time by shared prefixes than their kernel costs.

    Args:
        shared: The groups, on the CPU.
        shape: Shape of the model's keys and values.
    """
    groups = shared.groups.tolist()
    saved = sum((count - 1 - MEMBER_SHARE * count) * tokens for _, count, tokens in groups)
    return saved * shape.token_bytes > FIXED_BYTES * shape.prefix_cost


def bounds_of(shared: SharedPrefixes, size: int) -> PrefixBounds:
    """Returns the bounds of a step that serves shared prefixes.

    They are powers, so that few of them differ and few steps are captured. Programs for what is
    below the bounds end at once; powers of 2 keep their number low.

    Args:
        shared: The groups.
        size: Rows of the step.
    """
    groups, members, tokens = 1, 1, LEAST_TOKENS
    while groups < len(shared.groups):
        groups *= 2
    while members < shared.most:
        members *= 4
    while tokens < shared.longest:
        tokens *= 2
    return PrefixBounds(min(groups, size // 2), min(members, size), tokens)


class PrefixBuffers:
    """Shared prefixes of a decode step, in parts of two buffers of a fixed place and size.

    Groups that a step does not have are there without members, and nothing is computed for them.

    Args:
        host: Buffer on the CPU, [numbers(size, bounds)] int32.
        device: Buffer on the device of the cache, in the same shape.
        size: Rows of the step.
        bounds: Sizes of the prefixes that the step serves.
    """

    def __init__(self, host: Tensor, device: Tensor, size: int, bounds: PrefixBounds) -> None:
        self._size = size
        self._bounds = bounds
        self._host = self._view(host)
        self.prefixes = self._view(device)
        """The prefixes on the device."""

    @staticmethod
    def numbers(size: int, bounds: PrefixBounds) -> int:
        """Returns the number of elements of a buffer."""
        return 2 * size + 3 * bounds.groups

    def fill(self, shared: SharedPrefixes) -> None:
        """Writes the prefixes of a batch into the buffer on the CPU.

        Args:
            shared: Prefixes within the bounds, on the CPU.
        """
        for mine, given in zip(self._host[:3], shared[:3], strict=True):
            mine.zero_()
            mine[: len(given)] = given

    def _view(self, buffer: Tensor) -> SharedPrefixes:
        from lctrain_kernels import SharedPrefixes

        prefix, members, groups = buffer.split([self._size, self._size, 3 * self._bounds.groups])
        return SharedPrefixes(
            prefix, members, groups.view(-1, 3), self._bounds.tokens, self._bounds.members
        )
