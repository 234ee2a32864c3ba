"""TrainingOrder: which row each rank reads at each micro-batch of training."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lctrain.data.order import epoch_order, micro_batches


@dataclass(frozen=True, eq=False)
class TrainingOrder:
    """The rows of every rank, a pure function of the fields and the epoch.

    Attributes:
        costs: [R] attention work of every row.
        ranks: Number of ranks that read different rows.
        accumulated: Number of packs per rank in an optimizer step.
        seed: Seed of the shuffle.
        window: Number of optimizer steps within which rows are sorted by work.
    """

    costs: np.ndarray
    ranks: int
    accumulated: int
    seed: int
    window: int

    @property
    def packs(self) -> int:
        """Number of packs of all ranks in an optimizer step."""
        return self.ranks * self.accumulated

    @property
    def fills_a_step(self) -> bool:
        """Whether an epoch has a row for every pack of an optimizer step."""
        return len(self.costs) >= self.packs

    @property
    def steps(self) -> int:
        """Number of micro-batches of an epoch. Rows that do not fill a step are left out.

        If the whole epoch is shorter than one optimizer step, only the rows that do not fill a
        micro-batch are left out.
        """
        full = len(self.costs) // self.packs
        return full * self.accumulated or len(self.costs) // self.ranks

    def rows(self, epoch: int) -> np.ndarray:
        """Returns the row of every rank at every micro-batch of an epoch: [batches, ranks]."""
        packs = self.packs if self.fills_a_step else self.ranks
        steps = epoch_order(self.costs, packs, self.seed, epoch, self.window)
        return micro_batches(steps, self.costs, self.ranks)
