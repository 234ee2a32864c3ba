"""PackLoader: a data loader that can start at any batch, so that a run resumes exactly.

The training data is an endless stream of batches: batch n is step n % steps of epoch n // steps.
Every new iterator asks the data module for the number of batches that training has finished, and
starts with the next one. Batches that workers prefetched, or that a callback only inspected, are
therefore not counted as trained on.

The worker processes belong to the loader, not to an iterator. They continue across epochs, and are
restarted only if an iterator starts at a batch that does not follow the last one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from lctrain.batch import PackedBatch


class RowStream(Sampler[int]):
    """Sampler of one rank's rows: yields the row of batch `start`, then the rows after it."""

    def __init__(self, epoch_rows: Callable[[int], np.ndarray], steps: int, endless: bool) -> None:
        """Stores the order of the rows.

        Args:
            epoch_rows: Returns this rank's rows of an epoch: [steps] int64.
            steps: Steps of an epoch.
            endless: Whether the next epoch follows an epoch; False ends after epoch 0.
        """
        self._epoch_rows = lru_cache(maxsize=2)(epoch_rows)
        self._steps = steps
        self._endless = endless
        self.start = 0

    def __iter__(self) -> Iterator[int]:
        return map(self.row, self._numbers())

    def row(self, number: int) -> int:
        """Returns the row with a number, counted over epochs."""
        epoch, step = divmod(number, self._steps)
        return int(self._epoch_rows(epoch)[step])

    def epoch_of(self, number: int) -> int:
        """Returns the epoch to which the row of a batch belongs."""
        return number // self._steps

    def _numbers(self) -> Iterator[int]:
        """Yields the numbers of the batches from `start` on."""
        if self._endless:
            return itertools.count(self.start)
        return iter(range(self.start, self._steps))


class PlacedBatch(NamedTuple):
    """A PackedBatch of an endless stream, with its position in the stream.

    Attributes:
        batch: The batch.
        place: Position in the stream: the key "number" (index of the batch's window), and the
            fields of `lctrain.data.streaming.Window`. A resumed run reads this window again.
    """

    batch: PackedBatch
    place: dict[str, Any]


PLACES = 16  # number of positions that are kept: more than the batches that Lightning prefetches


@dataclass
class Cursor:
    """Counter of the batches that a loader has yielded; the loader and the data module share it.

    The loader and the data module share this object so that neither refers to the other. Python
    would destroy such a reference cycle only after the queues of the worker processes, and then
    wait for each worker.

    Attributes:
        batches: Number of the batch after the last one that was yielded.
        places: The last positions in an endless stream, as pairs (number of the first batch at the
            position, position): see PlacedBatch.
    """

    batches: int = 0
    places: list[tuple[int, dict[str, Any]]] = field(default_factory=list)

    def add_place(self, number: int, place: dict[str, Any]) -> None:
        """Stores `place`, the position in the stream of batch `number`."""
        self.places = [found for found in self.places if found[0] < number]
        if not self.places or self.places[-1][1] != place:
            self.places = [*self.places[1 - PLACES :], (number, place)]

    def place_before(self, number: int) -> dict[str, Any] | None:
        """Returns the position in the stream of batch `number` - 1; None if it is not stored."""
        found = [place for first, place in self.places if first < number]
        return found[-1] if found else None


class PackLoader:
    """Data loader of one rank: yields a PackedBatch per step; `len` is the steps of an epoch.

    It is not a subclass of torch's DataLoader, because Lightning would replace a DataLoader's
    sampler, and the rows are already divided among the ranks.
    """

    def __init__(
        self,
        rows: Dataset[PackedBatch] | Dataset[PlacedBatch],
        stream: Any,
        steps: int,
        position: Callable[[], int],
        cursor: Cursor | None = None,
        *,
        name: str | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
        collate_fn: Callable[[Any], Any] | None = None,
        mask: Callable[[PackedBatch, int], PackedBatch] | None = None,
    ) -> None:
        """Wraps a dataset.

        Args:
            rows: Dataset whose items are PackedBatches; or PlacedBatches, whose positions in the
                stream the cursor stores.
            stream: Sampler of this rank's rows. Its attribute `start` sets the first batch, and
                its method `epoch_of` returns the epoch of a batch.
            steps: Steps of an epoch.
            position: Returns the number of the batch that an iterator starts with.
            cursor: Counter that is set to the number of the next batch; None makes one.
            name: Name of the held-out set of the rows, for its metrics; None for training rows.
            num_workers: Number of worker processes; 0 loads in this process.
            pin_memory: Whether to copy batches to pinned memory.
            collate_fn: Function that changes every item before it is pinned; None for none.
            mask: Function from a batch and the number of its epoch to the batch with masked
                tokens; None masks nothing.
        """
        self.name = name
        self._mask, self._pin_memory = mask, pin_memory
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
            collate_fn=collate_fn,
            generator=torch.Generator(),  # else every iterator draws a global random number
        )
        # Lightning finds the workers by this attribute's name, and shuts them down at its end.
        self._iterator: Any = None
        self._iterator_at = 0

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[PackedBatch]:
        """Yields as many batches as an epoch has, starting with batch `position()`."""
        first = self._position()
        for number in range(first, first + self._steps):
            self._cursor.batches = number + 1
            yield self._masked(self._batch(number), self._stream.epoch_of(number))

    def state_dict(self) -> dict[str, Any]:
        """Returns an empty state, since the data module saves the position.

        Lightning treats a loader with this method as one that can resume.
        """
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Does nothing: the data module restores the position."""

    def _masked(self, batch: PackedBatch, epoch: int) -> PackedBatch:
        if self._mask is None:
            return batch
        masked = self._mask(batch, epoch)
        return masked.pin_memory() if self._pin_memory else masked

    def _batch(self, number: int) -> PackedBatch:
        if self._iterator is None or self._iterator_at != number:
            self._stream.start = number
            self._iterator = iter(self._dataloader)
        self._iterator_at = number + 1
        item = next(self._iterator)
        if isinstance(item, PlacedBatch):
            self._cursor.add_place(number, item.place)
            return item.batch
        return item
