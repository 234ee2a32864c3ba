"""seed_micro_batch: seeds dropout, so that a resumed run draws the same dropout masks."""

from __future__ import annotations

import lightning.pytorch as pl
import torch

from lctrain.distributed import Topology


def seed_micro_batch(trainer: pl.Trainer, seed: int) -> None:
    """Seeds torch's generators from (seed, rank, index of the micro-batch in the run).

    Call it in `on_train_batch_start`. A resumed run then draws the same dropout masks as an
    uninterrupted run. The first rank of every context group, which draws the seeds of attention
    dropout, counts as the rank of its pack, so sharing packs does not change these masks.

    Args:
        trainer: Trainer of the run, which knows the rank and the index of the micro-batch.
        seed: Seed of the run.
    """
    index = trainer.fit_loop.epoch_loop.total_batch_idx
    ranks = Topology.of(trainer)
    number = ranks.data_rank + ranks.context_rank * ranks.data_size
    torch.manual_seed(mix(seed, number, index))


def mix(seed: int, rank: int, index: int) -> int:
    """Returns a seed in [0, 2^63) from three integers, mixed by the splitmix64 finalizer."""
    mask = 2**64 - 1
    value = (seed * 0x9E3779B97F4A7C15 + rank * 0xD1B54A32D192ED03 + index) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return (value ^ (value >> 31)) >> 1
