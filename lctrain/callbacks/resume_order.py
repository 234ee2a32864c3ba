"""ResumeOrder: makes a resumed run continue with the first batch that it has not trained on."""

from __future__ import annotations

import lightning.pytorch as pl

from lctrain.data.resume import resume_order


class ResumeOrder(pl.Callback):
    """Makes `lctrain.data.RowOrder` samplers of the training data continue after a resume.

    The first row is computed from Lightning's counts of batches, so any DataLoader can be used.
    LongContextModule does this itself, and PackedDataModule resumes without it. Use this callback
    with a module and a DataLoader of your own.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sets the first row of the data, before Lightning requests a batch."""
        resume_order(trainer)
