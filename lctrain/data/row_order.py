"""RowOrder: a distributed sampler of packed rows that balances the ranks and can resume."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch.utils.data import DistributedSampler

from lctrain.data.order import BALANCE_WINDOW, epoch_order
from lctrain.distributed import Topology
from lctrain.pluralize import pluralize


class RowOrder(DistributedSampler[int]):
    """Distributed sampler: yields the shuffled rows of this rank, with balanced attention work.

    At every step the ranks get rows of similar attention work: see lctrain.data.order. The order is
    a pure function of (rows, world size, seed, epoch).

    With Lightning, a subclass of DistributedSampler is not replaced, and its epoch is set. In a
    resumed run, LongContextModule or the callback ResumeOrder starts the sampler after the last
    batch of the checkpoint. Without Lightning, call `set_epoch` before every epoch.

    Args:
        rows: Rows that `lctrain.data.pack` returned; or any dataset with a length, whose items
            count as equal work.
        seed: Seed of the shuffle.
        balance_window: Number of steps within which rows are sorted by attention work.
        num_replicas: Number of ranks. None takes it from torch.distributed when the sampler is
            first used.
        rank: Rank of this process. None takes it from torch.distributed.

    Raises:
        ValueError: if an argument is out of range; when the sampler is first used, if there are
            fewer rows than ranks.
    """

    def __init__(
        self,
        rows: Any,
        seed: int = 0,
        balance_window: int = BALANCE_WINDOW,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        for name, value, least in (("seed", seed, 0), ("balance_window", balance_window, 1)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}. Raise it.")
        if (num_replicas is None) != (rank is None):
            raise ValueError(
                "num_replicas and rank must be given together, got one. Add the other."
            )
        self.rows = rows
        self.seed = seed
        self.balance_window = balance_window
        self.epoch = 0
        self._ranks = None if num_replicas is None or rank is None else (num_replicas, rank)
        self._position: Callable[[], tuple[int, int] | None] = _nowhere

    def __len__(self) -> int:
        ranks, _ = self._place()
        steps = len(self.rows) // ranks
        if steps == 0:
            raise ValueError(
                f"rows must be at least one for each of {pluralize(ranks, 'rank')}, got "
                f"{len(self.rows)}. Use "
                "more data, fewer ranks, or a smaller max_tokens."
            )
        return steps

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch whose rows the next iterator yields."""
        self.epoch = epoch

    def follow(self, position: Callable[[], tuple[int, int] | None]) -> None:
        """Sets the function that every new iterator calls for its start position.

        Args:
            position: Returns (epoch, number of the epoch's first rows to skip), or None for the
                beginning of the epoch that `set_epoch` set.
        """
        self._position = position

    def __iter__(self) -> Iterator[int]:
        """Yields the rows of the epoch from the start position on."""
        place = self._position()
        len(self)  # raises for fewer rows than ranks
        epoch, offset = (self.epoch, 0) if place is None else place
        return iter(self._rows_of(epoch)[offset:].tolist())

    def _rows_of(self, epoch: int) -> np.ndarray:
        """Returns the rows that this rank reads in an epoch: [steps] int64."""
        ranks, rank = self._place()
        plan = getattr(self.rows, "plan", None)
        costs = np.ones(len(self.rows)) if plan is None else plan.costs()
        return epoch_order(costs, ranks, self.seed, epoch, self.balance_window)[:, rank]

    def _place(self) -> tuple[int, int]:
        """Returns the number of ranks, and the rank of this process."""
        if self._ranks is not None:
            return self._ranks
        ranks = Topology.of_process()
        return ranks.data_size, ranks.data_rank


def _nowhere() -> None:
    return None
