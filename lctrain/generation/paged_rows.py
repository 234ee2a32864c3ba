"""PagedRows: which pages hold the tokens of each row of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lctrain.generation.pages import PAGE, CacheShape, PagePool, pages_of, slots_of
from lctrain.generation.prefixes import PrefixPages

FIRST_PAGES = 64
"""Pages of a pool that grows, at its beginning."""


class Prompt(NamedTuple):
    """An empty row's new tokens, which say what its keys are.

    Attributes:
        tokens: Token ids without padding.
        first: Position of the first token; the positions count from there.
    """

    tokens: tuple[int, ...]
    first: int


class PagedRows:
    """The pages of each row, on the host. Rows that store the same tokens share pages.

    Args:
        shape: Shape of keys and values.
        device: Device of the pages.
        pages: Number of pages; None for a pool that grows.

    Attributes:
        pool: The pages.
        stored: Tokens of each row in the cache, without padding.
        version: Number that changes whenever rows may begin to share further pages, or end it.
    """

    def __init__(self, shape: CacheShape, device: torch.device, pages: int | None) -> None:
        self.pool = PagePool(shape, FIRST_PAGES if pages is None else pages, device)
        self.stored: list[int] = []
        self.version = 0
        self._grows = pages is None
        self._pages: list[list[int]] = []

    def clear(self, rows: int = 0) -> None:
        """Forgets all tokens, and begins with a number of empty rows."""
        for pages in self._pages:
            self.pool.release(pages)
        self._pages = [[] for _ in range(rows)]
        self.stored = [0] * rows
        self.version += 1

    def begin(self, prompts: Sequence[Prompt | int]) -> list[int]:
        """Gives empty rows the pages of their first tokens.

        Equal prompts share all pages. Others that begin alike share the full pages in common.

        Args:
            prompts: Prompt of each row; or the number of tokens, if their keys depend on more than
                the tokens, so that the row shares nothing.

        Returns:
            For each row, how many of its first tokens a row before it stores.

        Raises:
            ValueError: if a pool of a fixed size has too few pages.
        """
        self._trim()
        first: dict[Prompt, int] = {}
        prefixes: dict[int, PrefixPages] = {}
        known = [0] * len(prompts)
        for row, prompt in enumerate(prompts):
            pages = self._pages[row]
            if isinstance(prompt, int):
                pages += self._take(pages_of(prompt))
                continue
            tokens = prompt.tokens
            if (leader := first.setdefault(prompt, row)) != row:
                pages += self.pool.share(self._pages[leader])
                known[row] = len(tokens)
                continue
            window = self.pool.shape.window
            found = prefixes.setdefault(prompt.first, PrefixPages(window))
            pages += self.pool.share(found.find(tokens))
            known[row] = len(pages) * PAGE
            pages += self._take(pages_of(len(tokens)) - len(pages))
            found.add(tokens, pages)
        return known

    def extend(self, new: Sequence[int]) -> None:
        """Gives rows pages for new tokens, to which no other row refers.

        The last page of a row is copied if it is not full and another row refers to it.

        Args:
            new: Number of new tokens of each row.

        Raises:
            ValueError: if a pool of a fixed size has too few pages.
        """
        self._trim()
        for pages, stored, more in zip(self._pages, self.stored, new, strict=True):
            if more and stored % PAGE and self.pool.is_shared(pages[-1]):
                self._make_room(1)
                pages[-1] = self.pool.own(pages[-1])
            pages += self._take(pages_of(stored + more) - len(pages))

    def store(self, new: Sequence[int]) -> None:
        """Counts new tokens, whose keys and values are in the pages now."""
        before = self.stored
        self.stored = [stored + more for stored, more in zip(before, new, strict=True)]
        if any(a // PAGE != b // PAGE for a, b in zip(before, self.stored, strict=True)):
            self.version += 1

    def select(self, rows: Sequence[int]) -> None:
        """Makes row i a copy of row rows[i], without copying a page."""
        chosen = [0] * len(self._pages)
        for row in rows:
            chosen[row] += 1
        if list(rows) == list(range(len(chosen))):
            return
        self._trim()
        before = self._pages
        for row, pages in enumerate(before):  # no page is free in between
            for _ in range(chosen[row] - 1):
                self.pool.share(pages)
        for row, pages in enumerate(before):
            if not chosen[row]:
                self.pool.release(pages)
        self._pages = [list(before[row]) for row in rows]
        self.stored = [self.stored[row] for row in rows]
        self.version += 1

    def crop(self, tokens: int) -> None:
        """Removes up to a number of tokens from the end of each row."""
        self.stored = [max(0, stored - tokens) for stored in self.stored]
        self._trim()
        self.version += 1

    def table(self) -> Tensor:
        """Returns the pages of each row, [rows, width] int32 on the CPU; 0 where unused."""
        width = max((len(pages) for pages in self._pages), default=0)
        table = np.zeros((len(self._pages), max(width, 1)), dtype=np.int32)
        for row, pages in enumerate(self._pages):
            table[row, : len(pages)] = pages
        return torch.from_numpy(table)

    def slots(self, row: int, begin: int, end: int) -> Tensor:
        """Returns the places of a row's tokens in the flattened pages, [end - begin] int64."""
        return slots_of(self._pages[row], begin, end)

    def _trim(self) -> None:
        """Releases pages without tokens, which a forward pass that failed may have left."""
        for pages, stored in zip(self._pages, self.stored, strict=True):
            if len(pages) > (count := pages_of(stored)):
                self.pool.release(pages[count:])
                del pages[count:]

    def _take(self, count: int) -> list[int]:
        self._make_room(count)
        return self.pool.take(count)

    def _make_room(self, count: int) -> None:
        """Raises a ValueError, or makes the pool larger, unless it has a number of free pages."""
        pool = self.pool
        if count <= pool.free:
            return
        if not self._grows:
            raise ValueError(
                f"pages must be enough for the tokens of all rows, got {pool.pages} pages of "
                f"{PAGE} tokens, of which {pool.free} are free and {count} are needed. Pass a "
                "larger number, or None for a pool that grows."
            )
        pool.grow(max(2 * pool.pages, pool.pages + count - pool.free))
