"""BatchSeed: makes dropout reproducible after a resume, in any LightningModule."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from lctrain.dropout_seed import seed_micro_batch


class BatchSeed(pl.Callback):
    """Seeds torch's random generators before every micro-batch, as LongContextModule does.

    The seed is computed from (seed, rank, index of the micro-batch), so a resumed run draws the
    same dropout masks as an uninterrupted run.

    Args:
        seed: Seed of the run, at least 0.

    Raises:
        ValueError: if the seed is negative.
    """

    def __init__(self, seed: int = 0) -> None:
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}. Choose another.")
        self.seed = seed

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seeds torch's generators for this micro-batch."""
        seed_micro_batch(trainer, self.seed)
