"""ContextShard: which tokens of a pack each rank of a context-parallel group computes.

The ranks of the group share one pack. They form heads groups of `heads` consecutive ranks each:

- A heads group exchanges heads. Each of its ranks attends to all tokens of the heads group, with a
  share of the heads. So the tokens of the heads group are cut into equal consecutive parts.
- Heads groups gather keys from each other. A document is cut into chunks, and a heads group gets
  chunks from both ends of it (a zigzag), because a query at the end of a document attends to more
  keys than one at its beginning. Short documents are divided over fewer heads groups, the ones with
  the fewest tokens so far, or not at all.

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
        document: Index of the document in the pack.
        start: First token, counted in the document.
        stop: Token after the last one.
    """

    document: int
    start: int
    stop: int


class KeyRows(NamedTuple):
    """The keys that a rank selects from the keys that it gathered.

    Attributes:
        places: Index of every selected key in the gathered keys, in which the tokens of heads group
            g begin at g * max(group_tokens): [keys] int64.
        last: Numbers of the selected keys that belong to the last chunk of their document: int64.
            No place occurs twice among them.
        repeated: Numbers of the other ones, whose places occur among `last` again: int64.
    """

    places: np.ndarray
    last: np.ndarray
    repeated: np.ndarray


@dataclass(frozen=True)
class ContextShard:
    """Division of a pack over the ranks of a context group, a function of its arguments alone.

    `of` builds it. Rank r belongs to heads group r // heads.

    Attributes:
        lengths: Number of tokens of every document.
        size: Number of ranks.
        heads: Number of ranks of a heads group.
        chunks: Chunks of every heads group, in the order of the pack.
    """

    lengths: tuple[int, ...]
    size: int
    heads: int
    chunks: tuple[tuple[Chunk, ...], ...]

    @classmethod
    def of(cls, lengths: Sequence[int], size: int, heads: int = 1) -> ContextShard:
        """Divides a pack.

        Args:
            lengths: Tokens of every document; a document may be empty.
            size: Number of ranks, at least 1.
            heads: Number of ranks of a heads group, a divisor of `size`. See `choose_heads`.

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
        """Work of every rank: pairs (query, key) under causal attention, times its share of heads.

        The sum over ranks is the number of pairs of the pack.
        """
        pairs = (
            sum((c.stop * (c.stop + 1) - c.start * (c.start + 1)) // 2 for c in own)
            for own in self.chunks
        )
        return tuple(count / self.heads for count in pairs for _ in range(self.heads))

    def indices(self, rank: int) -> np.ndarray:
        """Returns the places of a rank's tokens in the pack: [tokens[rank]] int64."""
        first = sum(self.tokens[rank - rank % self.heads : rank])
        return self._group_indices(rank // self.heads)[first : first + self.tokens[rank]]

    @cached_property
    def order(self) -> np.ndarray:
        """Place in the pack of every token when the ranks' tokens follow one another: [T] int64."""
        return np.concatenate([self._group_indices(group) for group in range(self.groups)])

    def keys(self, rank: int) -> KeyRows:
        """Returns the keys that a rank's chunks attend to: for each chunk its document to its end.

        Args:
            rank: The rank.
        """
        counts = np.array(self.group_tokens)
        first = np.arange(self.groups) * counts.max() - (counts.cumsum() - counts)
        place = np.empty(len(self.order), dtype=np.int64)
        place[self.order] = np.repeat(first, counts) + np.arange(len(self.order))
        begins, own = self._begins, self.chunks[rank // self.heads]
        parts = [place[begins[d] : begins[d] + stop] for d, _, stop in own]
        # A document has at most two chunks in a heads group, one after the other.
        last = np.ones(len(own), dtype=bool)
        last[:-1] = [one.document != two.document for one, two in pairwise(own)]
        is_last = np.repeat(last, [chunk.stop for chunk in own])
        return KeyRows(
            np.concatenate([np.zeros(0, dtype=np.int64), *parts]),
            np.flatnonzero(is_last),
            np.flatnonzero(~is_last),
        )

    def _group_indices(self, group: int) -> np.ndarray:
        """Returns the places of a heads group's tokens in the pack: [group_tokens[group]] int64."""
        begins = self._begins
        own = [
            np.arange(begins[d] + first, begins[d] + end) for d, first, end in self.chunks[group]
        ]
        return np.concatenate([np.zeros(0, dtype=np.int64), *own])

    @cached_property
    def _begins(self) -> np.ndarray:
        """First token of every document, and the number of tokens: [documents + 1] int64."""
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
                start = chunks[group].pop().start  # two chunks that meet are one
            chunks[group].append(Chunk(document, start, stop))
    return tuple(tuple(sorted(own)) for own in chunks)


def choose_heads(exchange: str, size: int, key_heads: int, on_machine: int) -> int:
    """Returns the number of ranks of a heads group.

    Args:
        exchange: "heads", "keys", or "auto" for as many ranks as possible: those of one machine
            exchange heads, since an exchange of heads moves fewer bytes, and gather keys from
            other machines.
        size: Number of ranks of the context group.
        key_heads: Number of key/value heads, as the attention function gets them: pairs of heads
            in version 1 of differential attention. The greatest common divisor of all layers.
        on_machine: Number of ranks of a machine.

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
