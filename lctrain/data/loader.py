"""A loader that can start at any batch, so that a run resumes exactly.

The training data is an endless stream of batches: batch n is step n % steps of epoch n // steps.
Every iterator asks once where to start (the data module answers with the number of batches that
training has finished) and counts from there, so batches that workers have prepared in advance, or
that a callback has only looked at, never count as used.

The worker processes belong to the loader, not to an iterator: they go on across epochs, and are
restarted only if an iterator starts somewhere else.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from lctrain.batch import PackedBatch


class RowStream(Sampler[int]):
    """Rows of one rank from batch `start` on."""

    def __init__(self, epoch_rows: Callable[[int], np.ndarray], steps: int, endless: bool) -> None:
        """Takes a function from an epoch to the rows of this rank: [steps] int64."""
        self._epoch_rows = lru_cache(maxsize=2)(epoch_rows)
        self._steps = steps
        self._endless = endless
        self.start = 0

    def __iter__(self) -> Iterator[int]:
        numbers = itertools.count(self.start) if self._endless else range(self.start, self._steps)
        for number in numbers:
            epoch, step = divmod(number, self._steps)
            yield int(self._epoch_rows(epoch)[step])


@dataclass
class Cursor:
    """Number of the batch after the last one that any iterator has given out.

    It is an object of its own, so that loader and data module do not refer to each other: Python
    would collect such a circle only after the workers' queues, and then wait for each worker.
    """

    batches: int = 0


class PackLoader:
    """Yields one PackedBatch per step; `len` is the number of steps of an epoch.

    It is not a torch DataLoader, so that Lightning does not put its own sampler into it: the rows
    are already divided among the ranks.
    """

    def __init__(
        self,
        rows: Dataset[PackedBatch],
        stream: Any,
        steps: int,
        position: Callable[[], int],
        cursor: Cursor | None = None,
        *,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        """Wraps a dataset.

        Args:
            rows: The dataset.
            stream: Rows of this rank, in order.
            steps: Steps of an epoch.
            position: Called once per iterator: the batch it starts with.
            cursor: Set to the batch after each one given out.
            num_workers: Worker processes.
            pin_memory: Copy batches to pinned memory.
        """
        self._cursor = Cursor() if cursor is None else cursor
        self._stream = stream
        self._steps = steps
        self._position = position
        self._dataloader = DataLoader(
            rows,
            batch_size=None,
            sampler=stream,
            num_workers=num_workers,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # else each start draws from the global random numbers
        )
        # Under this name Lightning finds the workers and shuts them down at its end.
        self._iterator: Any = None
        self._iterator_at = 0

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[PackedBatch]:
        """One epoch's number of batches, from `position()` on."""
        first = self._position()
        for number in range(first, first + self._steps):
            self._cursor.batches = number + 1
            yield self._batch(number)

    def state_dict(self) -> dict[str, Any]:
        """Empty, since the data module's state has the position.

        It tells Lightning that the loader can resume.
        """
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See state_dict."""

    def _batch(self, number: int) -> PackedBatch:
        if self._iterator is None or self._iterator_at != number:
            self._stream.start = number
            self._iterator = iter(self._dataloader)
        self._iterator_at = number + 1
        return next(self._iterator)
