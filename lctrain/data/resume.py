"""resume_order: starts the data of a resumed run at the batch after the last one trained on."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from lctrain.data.row_order import RowOrder


def resume_order(trainer: pl.Trainer) -> None:
    """Starts every RowOrder of the training data where Lightning's own counts say.

    To be called in `on_train_start`: Lightning has restored its counts by then, and has asked for
    no batch. A DataLoader with workers has read ahead from the wrong place; its iterator is made
    anew. Harmless where no data loader has a RowOrder, and in a run that does not resume.
    """
    loaders = trainer.fit_loop._combined_loader
    fetcher = trainer.fit_loop._data_fetcher
    batches = trainer.num_training_batches
    if loaders is None or fetcher is None or batches == float("inf") or not batches:
        return
    finished = trainer.fit_loop.epoch_loop.batch_progress.total.processed
    epoch, batch = divmod(finished, int(batches))
    ordered = [(loader, order) for loader in loaders.flattened if (order := _order_of(loader))]
    if not ordered or finished == 0:
        return
    for loader, order in ordered:
        order.start_at(epoch, batch * (getattr(loader, "batch_size", None) or 1))
    iter(fetcher)


def _order_of(loader: Any) -> RowOrder | None:
    """The RowOrder of a DataLoader, also below a batch sampler."""
    for sampler in (getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)):
        found = sampler if isinstance(sampler, RowOrder) else getattr(sampler, "sampler", None)
        if isinstance(found, RowOrder):
            return found
    return None
