"""resume_order: makes a RowOrder sampler continue after the last batch that was trained on."""

from __future__ import annotations

import weakref
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn

from lctrain.data.row_order import RowOrder


def resume_order(trainer: pl.Trainer) -> None:
    """Sets the start of every RowOrder of the training data to Lightning's restored position.

    Call it in `on_train_start`, after Lightning has restored its counts and before it fetches a
    batch. In a resumed run the iterators of the data loaders are created again, because workers
    have prefetched batches from the beginning. The function does nothing if no data loader has a
    RowOrder.
    """
    loaders, fetcher = trainer.fit_loop._combined_loader, trainer.fit_loop._data_fetcher
    if loaders is None or fetcher is None:
        return
    ordered = [(loader, order) for loader in loaders.flattened if (order := _order_of(loader))]
    for loader, order in ordered:
        order.follow(_Position(trainer, _rows_per_batch(loader)))
    if ordered and trainer.fit_loop.epoch_loop.batch_progress.total.processed:
        iter(fetcher)


class _Position:
    """Position function of a RowOrder: returns (epoch, number of rows finished in the epoch).

    Outside of a fit it returns None.
    """

    def __init__(self, trainer: pl.Trainer, rows_per_batch: int) -> None:
        self._trainer = weakref.ref(trainer)
        self._rows_per_batch = rows_per_batch

    def __call__(self) -> tuple[int, int] | None:
        trainer = self._trainer()
        if trainer is None or trainer.state.fn != TrainerFn.FITTING or not trainer.training:
            return None
        batches = trainer.num_training_batches
        if trainer.overfit_batches or not batches or batches == float("inf"):
            return None
        finished = trainer.fit_loop.epoch_loop.batch_progress.total.processed
        epoch, batch = divmod(finished, int(batches))
        return epoch, batch * self._rows_per_batch


def _rows_per_batch(loader: Any) -> int:
    """Returns the rows of a full batch, which the loader or its own batch sampler defines."""
    sizes = (getattr(part, "batch_size", None) for part in (loader, _batch_sampler(loader)))
    return next((size for size in sizes if size is not None), 1)


def _batch_sampler(loader: Any) -> Any:
    return getattr(loader, "batch_sampler", None)


def _order_of(loader: Any) -> RowOrder | None:
    """Returns the RowOrder that a DataLoader or its batch sampler reads; None if there is none."""
    for sampler in (getattr(loader, "sampler", None), _batch_sampler(loader)):
        found = sampler if isinstance(sampler, RowOrder) else getattr(sampler, "sampler", None)
        if isinstance(found, RowOrder):
            return found
    return None
