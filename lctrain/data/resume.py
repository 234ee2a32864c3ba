"""resume_order: starts the data of a resumed run at the batch after the last one trained on."""

from __future__ import annotations

import weakref
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn

from lctrain.data.row_order import RowOrder


def resume_order(trainer: pl.Trainer) -> None:
    """Starts every RowOrder of the training data at the position of Lightning's own counts.

    To be called in `on_train_start`: Lightning has restored its counts by then, and has asked for
    no batch. A DataLoader with workers has read ahead from the wrong place; its iterator is made
    anew. Harmless where no data loader has a RowOrder, and in a run that does not resume.
    """
    loaders, fetcher = trainer.fit_loop._combined_loader, trainer.fit_loop._data_fetcher
    if loaders is None or fetcher is None:
        return
    ordered = [(loader, order) for loader in loaders.flattened if (order := _order_of(loader))]
    for loader, order in ordered:
        order.follow(_Position(trainer, getattr(loader, "batch_size", None) or 1))
    if ordered and trainer.fit_loop.epoch_loop.batch_progress.total.processed:
        iter(fetcher)


class _Position:
    """Position of a running fit: (epoch, rows finished in it); None outside of a fit."""

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


def _order_of(loader: Any) -> RowOrder | None:
    """The RowOrder of a DataLoader, also below a batch sampler."""
    for sampler in (getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)):
        found = sampler if isinstance(sampler, RowOrder) else getattr(sampler, "sampler", None)
        if isinstance(found, RowOrder):
            return found
    return None
