"""ContextShard: which tokens of a pack each rank of a context-parallel group computes.

A context group is a set of ranks that share one pack. It is divided into heads groups, each of
`heads` consecutive ranks:

- Within a heads group, ranks exchange heads (Ulysses): during attention each rank has all tokens of
  the heads group and a part of the heads. Outside of attention, each rank has an equal consecutive
  part of these tokens.
- Between heads groups, ranks gather keys. A document is cut into chunks, and a heads group gets one
  chunk from each end of the document (zigzag). A query near the end attends to more keys than one
  near the beginning, so this balances the work. A short document is divided over fewer heads
  groups, those with the fewest tokens so far, or not at all.

With heads = size, all ranks form one heads group; with heads = 1, each rank is a heads group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import gcd
from typing import NamedTuple

import numpy as np

EXCHANGES = ("auto", "heads", "keys")
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


class KeyRows(NamedTuple):
    """The gathered keys that the queries of one rank need.

    The queries of a chunk need their document's keys, from the document's start to the chunk's end.
    If a heads group has two chunks of one document, the keys that the first chunk needs occur
    twice.

    Attributes:
        places: Index of every needed key in the gathered keys, [keys] int64. In the gathered keys,
            the tokens of heads group g begin at g * max(group_tokens).
        last: Indices into `places` of the keys that belong to the last chunk of their document,
            int64. No key occurs twice among them.
        repeated: Indices into `places` of all other keys, int64. These keys occur among `last`,
            too.
    """

    places: np.ndarray
    last: np.ndarray
    repeated: np.ndarray


@dataclass(frozen=True)
class ContextShard:
    """Assignment of a pack's tokens to the ranks of a context group.

    `of` builds it from the documents' lengths alone, so every rank builds the same one. Rank r
    belongs to heads group r // heads.

    Attributes:
        lengths: Number of tokens of every document.
        size: Number of ranks.
        heads: Number of ranks in a heads group.
        chunks: Chunks of every heads group, in the order of the pack.
    """

    lengths: tuple[int, ...]
    size: int
    heads: int
    chunks: tuple[tuple[Chunk, ...], ...]

    @classmethod
    def of(cls, lengths: Sequence[int], size: int, heads: int = 1) -> ContextShard:
        """Assigns the tokens of a pack to ranks.

        Args:
            lengths: Number of tokens of every document; a document may be empty.
            size: Number of ranks, at least 1.
            heads: Number of ranks in a heads group, a divisor of `size`. See `choose_heads`.

        Raises:
            ValueError: if `size` is below 1, `heads` does not divide it, or a length is negative.
        """
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}. One rank computes all tokens.")
        if heads < 1 or size % heads != 0:
            raise ValueError(
                f"heads must divide the {size} ranks, got {heads}. Exchange heads among fewer "
                "ranks, or keys."
            )
        if min(lengths, default=0) < 0:
            raise ValueError(f"lengths must be at least 0, got {min(lengths)}. Correct the pack.")
        lengths = tuple(int(length) for length in lengths)
        return cls(lengths, size, heads, _chunks(lengths, size // heads))

    @property
    def groups(self) -> int:
        """Number of heads groups."""
        return self.size // self.heads

    @cached_property
    def group_tokens(self) -> tuple[int, ...]:
        """Number of tokens of every heads group."""
        return tuple(sum(chunk.stop - chunk.start for chunk in own) for own in self.chunks)

    @cached_property
    def tokens(self) -> tuple[int, ...]:
        """Number of tokens of every rank."""
        return tuple(
            count // self.heads + (place < count % self.heads)
            for count in self.group_tokens
            for place in range(self.heads)
        )

    @cached_property
    def work(self) -> tuple[float, ...]:
        """Number of causal (query, key) pairs of each rank, times its share of the heads.

        The sum over ranks is the number of pairs of the pack.
        """
        pairs = (
            sum((c.stop * (c.stop + 1) - c.start * (c.start + 1)) // 2 for c in own)
            for own in self.chunks
        )
        return tuple(count / self.heads for count in pairs for _ in range(self.heads))

    def indices(self, rank: int) -> np.ndarray:
        """Returns the indices of a rank's tokens in the pack: [tokens[rank]] int64."""
        first = sum(self.tokens[rank - rank % self.heads : rank])
        return self._group_indices(rank // self.heads)[first : first + self.tokens[rank]]

    @cached_property
    def order(self) -> np.ndarray:
        """Index in the pack of every token, rank 0's tokens first: [T] int64."""
        return np.concatenate([self._group_indices(group) for group in range(self.groups)])

    def keys(self, rank: int) -> KeyRows:
        """Returns which of the gathered keys the queries of a rank's heads group need.

        Args:
            rank: The rank.
        """
        counts = np.array(self.group_tokens)
        first = np.arange(self.groups) * counts.max() - (counts.cumsum() - counts)
        place = np.empty(len(self.order), dtype=np.int64)
        place[self.order] = np.repeat(first, counts) + np.arange(len(self.order))
        begins, own = self._begins, self.chunks[rank // self.heads]
        parts = [place[begins[d] : begins[d] + stop] for d, _, stop in own]
        # A heads group has at most two chunks of a document, adjacent in this list.
        last = np.ones(len(own), dtype=bool)
        last[:-1] = [one.document != two.document for one, two in pairwise(own)]
        is_last = np.repeat(last, [chunk.stop for chunk in own])
        return KeyRows(
            np.concatenate([np.zeros(0, dtype=np.int64), *parts]),
            np.flatnonzero(is_last),
            np.flatnonzero(~is_last),
        )

    def _group_indices(self, group: int) -> np.ndarray:
        """Returns the indices in the pack of a heads group's tokens, [n] int64."""
        begins = self._begins
        own = [
            np.arange(begins[d] + first, begins[d] + end) for d, first, end in self.chunks[group]
        ]
        return np.concatenate([np.zeros(0, dtype=np.int64), *own])

    @cached_property
    def _begins(self) -> np.ndarray:
        """Index in the pack of every document's first token, then T: [documents + 1] int64."""
        return np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)


def _chunks(lengths: tuple[int, ...], groups: int) -> tuple[tuple[Chunk, ...], ...]:
    """Returns the chunks of every heads group, in the order of the pack."""
    chunks: list[list[Chunk]] = [[] for _ in range(groups)]
    tokens = np.zeros(groups, dtype=np.int64)
    for document in sorted(range(len(lengths)), key=lambda d: (-lengths[d], d)):
        length = lengths[document]
        ranks = max(1, min(groups, length // (2 * BORDER)))
        order = np.argsort(tokens, kind="stable")[:ranks]
        borders = [round(length * i / (2 * ranks * BORDER)) * BORDER for i in range(2 * ranks)]
        borders.append(length)
        # The last chunk has the remainder, so it goes to the group with the fewest tokens.
        for place, (start, stop) in enumerate(pairwise(borders)):
            group = int(order[min(place, 2 * ranks - 1 - place)])
            if start == stop:
                continue
            tokens[group] += stop - start
            if chunks[group] and chunks[group][-1][::2] == (document, start):
                start = chunks[group].pop().start  # two adjacent chunks become one
            chunks[group].append(Chunk(document, start, stop))
    return tuple(tuple(sorted(own)) for own in chunks)


def choose_heads(exchange: str, size: int, key_heads: int, on_machine: int) -> int:
    """Returns how many ranks form a heads group.

    The ranks of a heads group exchange heads; heads groups gather keys from each other.

    Args:
        exchange: "heads" puts all ranks into one heads group; "keys" makes each rank a heads group.
            "auto" takes the largest size that divides the number of ranks, of key/value heads and
            of ranks on a machine. Heads, which are fewer bytes, are then exchanged within a
            machine, and keys are gathered between heads groups.
        size: Number of ranks of the context group.
        key_heads: Greatest common divisor, over all layers, of the number of key/value heads that
            the attention function gets. In version 1 of differential attention these are pairs of
            heads.
        on_machine: Number of ranks on a machine.

    Raises:
        ValueError: if `exchange` is unknown, or is "heads" and `size` does not divide the heads.
    """
    if exchange not in EXCHANGES:
        raise ValueError(
            f"exchange must be one of {', '.join(EXCHANGES)}, got {exchange!r}. 'auto' exchanges "
            "heads where it can."
        )
    if exchange == "heads" and key_heads % size != 0:
        raise ValueError(
            f"size must divide the key/value heads to exchange heads, got {size} ranks and "
            f"{key_heads} heads. Exchange keys instead, or use fewer ranks."
        )
    if exchange != "auto":
        return size if exchange == "heads" else 1
    return gcd(size, key_heads, on_machine)
