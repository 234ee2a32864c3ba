"""Divides documents and prompts over the ranks of a run, and puts their results together."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from lctrain.distributed import Topology

T = TypeVar("T")


def owners(costs: Sequence[float], size: int) -> np.ndarray:
    """Returns which data rank computes each part of the work, so that all have about as much.

    The most expensive part goes first, to the rank with the least work so far. The result depends
    on the arguments only, so all ranks compute the same.

    Args:
        costs: Work of every part, in any unit.
        size: Number of data ranks.

    Returns:
        [parts] int64.
    """
    found = np.zeros(len(costs), dtype=np.int64)
    heap = [(0.0, rank) for rank in range(size)]
    for part in np.argsort(-np.asarray(costs, dtype=np.float64), kind="stable"):
        work, rank = heapq.heappop(heap)
        found[part] = rank
        heapq.heappush(heap, (work + costs[part], rank))
    return found


def summed(sums: np.ndarray, ranks: Topology) -> np.ndarray:
    """Returns the sum of an array over the data ranks. All ranks must call it.

    Where only one data rank has a value other than 0, that value is returned to the bit.

    Args:
        sums: Numbers of this rank, the same on all ranks that share a pack.
        ranks: Ranks of the run.
    """
    if ranks.data_size == 1:
        return sums
    return np.sum(ranks.gather(sums)[:: ranks.context], axis=0)


def share_of(parts: Sequence[T], ranks: Topology) -> list[T]:
    """Returns the parts that this rank computes: as many on each rank, some of them twice.

    Ranks that share parameters call the same layers equally often.

    Args:
        parts: All parts.
        ranks: Ranks of the run.
    """
    size, count = ranks.data_size, -(-len(parts) // ranks.data_size)
    return [parts[(ranks.data_rank + i * size) % len(parts)] for i in range(count)]


def joined(found: Sequence[T], count: int, ranks: Topology) -> list[T]:
    """Returns the results of all parts in their order. All ranks must call it.

    Args:
        found: Results of `share_of` on this rank, one for each part.
        count: Number of all parts.
        ranks: Ranks of the run.
    """
    of_ranks: list[Any] = ranks.gather(list(found))[:: ranks.context]
    return [one for together in zip(*of_ranks, strict=True) for one in together][:count]
