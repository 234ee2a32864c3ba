"""PagePool: keys and values of all layers in pages, which requests own or share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class CacheMemoryError(ValueError):
    """The keys and values of a request, or of a batch of them, do not fit the memory."""


PAGE = 64
"""Tokens of a page: a block of keys of the decode kernels' tiles lies on one page."""


class CacheShape(NamedTuple):
    """Shape of a model's keys and values, the same in all layers, and what its attention does.

    Attributes:
        layers: Number of attention layers.
        heads: Number of key/value heads.
        head_dim: Head dim of queries, keys and values.
        dtype: Dtype of keys and values.
        prefix_cost: Highest StepAttention.prefix_cost of the layers.
        window: Tokens of a request from which on its keys and values depend on its length, as with
            scale="yarn" of dual chunk attention; None if they never do.
    """

    layers: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    prefix_cost: float = 1.0
    window: int | None = None

    @property
    def token_bytes(self) -> int:
        """Bytes of the keys and values of a token in one layer."""
        return 2 * self.heads * self.head_dim * self.dtype.itemsize

    @property
    def page_bytes(self) -> int:
        """Bytes of a page: keys and values of PAGE tokens in all layers."""
        return self.layers * PAGE * self.token_bytes


def pages_of(tokens: int) -> int:
    """Returns the number of pages that hold a number of tokens."""
    return -(-tokens // PAGE)


def slots_of(pages: Sequence[int], begin: int, end: int) -> Tensor:
    """Returns the places of tokens `begin` to `end` in the flattened pages, [end - begin] int64."""
    index = np.arange(begin, end)
    return torch.from_numpy(np.array(pages, dtype=np.int64)[index // PAGE] * PAGE + index % PAGE)


class PagePool:
    """Pages on a device, with the number of users of each page on the host.

    A page that several requests use is never written to: `own` copies it first.

    Args:
        shape: Shape of keys and values.
        pages: Number of pages.
        device: Device of the pages.

    Raises:
        CacheMemoryError: if the pages do not fit the memory.

    Attributes:
        shape: Shape of keys and values.
        pages: Number of pages.
    """

    def __init__(self, shape: CacheShape, pages: int, device: torch.device) -> None:
        self.shape = shape
        self.pages = pages
        self._storage = _allocate(shape, pages, device)
        self._free = list(range(pages - 1, -1, -1))
        self._users = [0] * pages

    def grow(self, pages: int) -> None:
        """Makes the pool larger. Pages keep their numbers, and move to new memory.

        Args:
            pages: Number of pages, at least `pages`.

        Raises:
            CacheMemoryError: if the old and the new pages do not fit the memory together.
        """
        storage = _allocate(self.shape, pages, self._storage.device)
        storage[:, :, : self.pages] = self._storage
        self._storage = storage
        self._free = [*range(pages - 1, self.pages - 1, -1), *self._free]
        self._users += [0] * (pages - self.pages)
        self.pages = pages

    @property
    def free(self) -> int:
        """Number of pages without a user."""
        return len(self._free)

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Returns keys and values of a layer, each [pages, PAGE, Hk, D]; views of the pool."""
        return self._storage[index, 0], self._storage[index, 1]

    def take(self, count: int) -> list[int]:
        """Returns free pages, which now have one user each.

        Args:
            count: Number of pages, at most `free`.
        """
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._users[page] = 1
        return taken

    def share(self, pages: Sequence[int]) -> list[int]:
        """Adds a user to each of some pages, and returns them as that user's list."""
        for page in pages:
            self._users[page] += 1
        return list(pages)

    def release(self, pages: Sequence[int]) -> list[int]:
        """Removes a user from each of some pages; returns those without a user, which are free."""
        freed = []
        for page in pages:
            self._users[page] -= 1
            if self._users[page] == 0:
                freed.append(page)
        self._free += freed
        return freed

    def is_shared(self, page: int) -> bool:
        """Returns whether a page has several users."""
        return self._users[page] > 1

    def own(self, page: int) -> int:
        """Returns a page with the same contents and one user, in place of a shared page.

        Args:
            page: A page with several users. The pool must have a free page.
        """
        (copy,) = self.take(1)
        self._storage[:, :, copy] = self._storage[:, :, page]
        self.release([page])
        return copy


def _allocate(shape: CacheShape, pages: int, device: torch.device) -> Tensor:
    """Returns memory for pages, [layers, 2, pages, PAGE, Hk, D]; raises unless it fits."""
    size = (shape.layers, 2, pages, PAGE, shape.heads, shape.head_dim)
    try:
        return torch.empty(size, dtype=shape.dtype, device=device)
    except RuntimeError as error:
        # torch's allocator for a CPU raises no error of its own; a GPU's may be an earlier one.
        if device.type == "cuda" and not isinstance(error, torch.OutOfMemoryError):
            raise
        raise CacheMemoryError(
            f"the paged cache must fit the memory of {device}, got {pages} pages of "
            f"{shape.page_bytes} bytes. Use shorter prompts, a lower max_new_tokens or fewer rows "
            "(batch_size), or give the cache less: cache_gib of generate, pages of PagedCache."
        ) from error
