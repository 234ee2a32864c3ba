"""ContextShard: which tokens of a pack each rank of a context group computes.

A document is cut into chunks, and a rank gets chunks from both ends of it (a zigzag), because a
query at the end of a document attends to more keys than one at its beginning. Short documents are
divided over fewer ranks, the ones with the fewest tokens so far, or not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np

BORDER = 128
"""Chunks begin at multiples of this number of tokens, where the kernels' tiles begin. Output and
gradients of queries then have the bits of the undivided run."""


class Chunk(NamedTuple):
    """Consecutive tokens of one document.

    Attributes:
        document: Index of the document in the pack.
        start: First token, counted in the document.
        stop: Token after the last one.
    """

    document: int
    start: int
    stop: int


@dataclass(frozen=True)
class ContextShard:
    """Division of a pack over the ranks of a context group, a function of lengths and size alone.

    Attributes:
        lengths: Tokens of every document.
        size: Number of ranks.
        chunks: Chunks of every rank, in the order of the pack.
    """

    lengths: tuple[int, ...]
    size: int
    chunks: tuple[tuple[Chunk, ...], ...]

    @classmethod
    def of(cls, lengths: Sequence[int], size: int) -> ContextShard:
        """Divides a pack.

        Args:
            lengths: Tokens of every document; a document may be empty.
            size: Number of ranks, at least 1.

        Raises:
            ValueError: if `size` is below 1, or a length is negative.
        """
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}. One rank computes all tokens.")
        if min(lengths, default=0) < 0:
            raise ValueError(f"lengths must be at least 0, got {min(lengths)}. Correct the pack.")
        chunks: list[list[Chunk]] = [[] for _ in range(size)]
        tokens = np.zeros(size, dtype=np.int64)
        for document in sorted(range(len(lengths)), key=lambda d: (-lengths[d], d)):
            length = int(lengths[document])
            ranks = max(1, min(size, length // (2 * BORDER)))
            order = np.argsort(tokens, kind="stable")[:ranks]
            borders = [round(length * i / (2 * ranks * BORDER)) * BORDER for i in range(2 * ranks)]
            borders.append(length)
            # The last chunk has the remainder, so it goes to the rank with the fewest tokens.
            for place, (start, stop) in enumerate(pairwise(borders)):
                rank = int(order[min(place, 2 * ranks - 1 - place)])
                if start < stop:
                    chunks[rank].append(Chunk(document, start, stop))
                    tokens[rank] += stop - start
        return cls(
            tuple(int(length) for length in lengths), size, tuple(tuple(sorted(c)) for c in chunks)
        )

    @cached_property
    def tokens(self) -> tuple[int, ...]:
        """Number of tokens of every rank."""
        return tuple(sum(chunk.stop - chunk.start for chunk in own) for own in self.chunks)

    @cached_property
    def work(self) -> tuple[int, ...]:
        """Number of pairs (query, key) of every rank under causal attention."""
        return tuple(
            sum((c.stop * (c.stop + 1) - c.start * (c.start + 1)) // 2 for c in own)
            for own in self.chunks
        )

    def indices(self, rank: int) -> np.ndarray:
        """Returns the places of a rank's tokens in the pack: [tokens[rank]] int64."""
        begins = self._begins
        own = [np.arange(begins[d] + first, begins[d] + end) for d, first, end in self.chunks[rank]]
        return np.concatenate([np.zeros(0, dtype=np.int64), *own])

    @cached_property
    def _begins(self) -> np.ndarray:
        """First token of every document, and the number of tokens: [documents + 1] int64."""
        return np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)

    @cached_property
    def order(self) -> np.ndarray:
        """Place in the pack of every token when the ranks' tokens follow one another: [T] int64."""
        return np.concatenate([self.indices(rank) for rank in range(self.size)])

    def keys(self, rank: int, stride: int) -> np.ndarray:
        """Returns the keys that a rank's chunks attend to: for each chunk its document to its end.

        Args:
            rank: The rank.
            stride: Distance of the ranks' first tokens in the gathered keys.

        Returns:
            [keys] int64, indices into the gathered keys, in which rank r's tokens begin at
            r * stride.
        """
        counts = np.array(self.tokens)
        first = np.repeat(np.arange(self.size) * stride - (counts.cumsum() - counts), counts)
        place = np.empty(len(self.order), dtype=np.int64)
        place[self.order] = first + np.arange(len(self.order))
        begins = self._begins
        own = [place[begins[d] : begins[d] + stop] for d, _, stop in self.chunks[rank]]
        return np.concatenate([np.zeros(0, dtype=np.int64), *own])
