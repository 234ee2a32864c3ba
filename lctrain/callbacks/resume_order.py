"""ResumeOrder: makes a resumed run continue with the batch after the last one."""

from __future__ import annotations

import lightning.pytorch as pl

from lctrain.data.resume import resume_order


class ResumeOrder(pl.Callback):
    """Starts every `lctrain.data.RowOrder` of the training data where the checkpoint ends.

    It reads Lightning's own counts of batches, so the data loader may be any DataLoader.
    LongContextModule does this itself, and PackedDataModule needs none of it.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sets the first row. Lightning has not requested a batch before."""
        resume_order(trainer)
