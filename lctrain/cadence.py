"""When a training step logs: the only steps at which anything waits for the device."""

from __future__ import annotations

import lightning.pytorch as pl


def at_log_step(trainer: pl.Trainer) -> bool:
    """Whether the micro-batch that just ended made an optimizer step whose metrics are logged.

    To be asked in `on_train_batch_end`. The same on all ranks.
    """
    every = trainer.log_every_n_steps
    if every == 0 or trainer.fit_loop._should_accumulate():
        return False
    return trainer.global_step % every == 0
