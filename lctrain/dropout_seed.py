"""The seed of a micro-batch: dropout that does not depend on interruptions."""

from __future__ import annotations

import lightning.pytorch as pl
import torch


def seed_micro_batch(trainer: pl.Trainer, seed: int) -> None:
    """Seeds torch's generators from (seed, rank, index of the micro-batch in the run).

    To be called in `on_train_batch_start`. A resumed run then draws the same dropout masks,
    whatever else has drawn random numbers in between.
    """
    index = trainer.fit_loop.epoch_loop.total_batch_idx
    torch.manual_seed(mix(seed, trainer.global_rank, index))


def mix(seed: int, rank: int, index: int) -> int:
    """A seed in [0, 2^63) from three counters (splitmix64 finalizer)."""
    mask = 2**64 - 1
    value = (seed * 0x9E3779B97F4A7C15 + rank * 0xD1B54A32D192ED03 + index) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return (value ^ (value >> 31)) >> 1
