"""ContextShard: which tokens of a pack each rank of a context-parallel group computes.

A document is cut into chunks, and a rank gets one chunk from each end of the document (zigzag). A
query near the end attends to more keys than one near the beginning, so this balances the work. A
short document is divided over fewer ranks, those with the fewest tokens so far, or not at all.
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
        document: Index of the document in the pack, from 0.
        start: First token of the chunk, counted from the document's first token.
        stop: End of the chunk, exclusive, counted in the same way.
    """

    document: int
    start: int
    stop: int


@dataclass(frozen=True)
class ContextShard:
    """Assignment of a pack's tokens to the ranks of a context-parallel group.

    It depends only on the documents' lengths and the number of ranks, so every rank computes the
    same one.

    Attributes:
        lengths: Number of tokens of every document.
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
        """Number of (query, key) pairs that each rank computes under causal attention."""
        return tuple(
            sum((c.stop * (c.stop + 1) - c.start * (c.start + 1)) // 2 for c in own)
            for own in self.chunks
        )

    def indices(self, rank: int) -> np.ndarray:
        """Returns the indices of a rank's tokens in the pack: [tokens[rank]] int64."""
        begins = self._begins
        own = [np.arange(begins[d] + first, begins[d] + end) for d, first, end in self.chunks[rank]]
        return np.concatenate([np.zeros(0, dtype=np.int64), *own])

    @cached_property
    def _begins(self) -> np.ndarray:
        """Index in the pack of every document's first token, then T: [documents + 1] int64."""
        return np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)

    @cached_property
    def order(self) -> np.ndarray:
        """Index in the pack of every token, rank 0's tokens first: [T] int64."""
        return np.concatenate([self.indices(rank) for rank in range(self.size)])

    def keys(self, rank: int, stride: int) -> np.ndarray:
        """Returns which gathered keys a rank's queries need.

        For every chunk of queries these are the keys of its document, from the document's first
        token to the chunk's end. An all-gather puts the keys of all ranks one after another;
        `stride` rows belong to each rank.

        Args:
            rank: The rank.
            stride: Number of rows per rank in the gathered keys; the keys of rank r begin at row
                stride * r.

        Returns:
            [keys] int64, indices into the gathered keys, chunk by chunk.
        """
        counts = np.array(self.tokens)
        first = np.repeat(np.arange(self.size) * stride - (counts.cumsum() - counts), counts)
        place = np.empty(len(self.order), dtype=np.int64)
        place[self.order] = first + np.arange(len(self.order))
        begins = self._begins
        own = [place[begins[d] : begins[d] + stop] for d, _, stop in self.chunks[rank]]
        return np.concatenate([np.zeros(0, dtype=np.int64), *own])
