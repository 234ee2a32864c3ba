"""at_log_step: decides at which steps metrics are logged; only there code waits for the device."""

from __future__ import annotations

import lightning.pytorch as pl


def at_log_step(trainer: pl.Trainer) -> bool:
    """Whether the last micro-batch completed an optimizer step whose metrics are logged.

    Call it in `on_train_batch_end`. The result is the same on all ranks, and is true at the steps
    at which Lightning logs. In manual optimization every batch counts as one step.
    """
    every = trainer.log_every_n_steps
    if every == 0:
        return False
    if not trainer.lightning_module.automatic_optimization:
        return (trainer.fit_loop.epoch_loop._batches_that_stepped + 1) % every == 0
    return not trainer.fit_loop._should_accumulate() and trainer.global_step % every == 0
