"""StopAtSignal: ends a run after the step in which a signal arrived, and saves a checkpoint."""

from __future__ import annotations

import os
import signal
from typing import Any

import lightning.pytorch as pl
import torch

from lctrain.callbacks.checkpoint import step_checkpoints
from lctrain.distributed import Topology
from lctrain.run.signals import SIGNALS, StopRun, StopSignals
from lctrain.run.slurm import requeue


class StopAtSignal(pl.Callback):
    """Ends training, on all ranks together, after the optimizer step in which a signal arrived.

    A checkpoint is saved, the step's metrics are logged, and any validation after the step runs;
    then StopRun is raised. In a SLURM job that is not interactive, SIGUSR1 also requeues the job.

    Args:
        signals: The signals that this process has received. During training, its attribute `waits`
            is True: a first signal then waits for the end of the step.
    """

    def __init__(self, signals: StopSignals) -> None:
        self.signals = signals
        self._agreed: int | None = None
        self._ranks = Topology()
        self._group: Any = None
        self._requeues = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Installs the signal handlers again, since Lightning has replaced them by its own."""
        if "SLURM_JOB_ID" in os.environ:
            # Lightning has installed a handler for SIGUSR1 only if the job is not interactive.
            self._requeues = callable(signal.getsignal(signal.SIGUSR1))
        self.signals.install(*SIGNALS)
        self.signals.waits = True
        self._ranks = Topology.of(trainer)
        self._group = self._ranks.cpu_group()  # so that no step waits for the device

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Raises StopRun if a signal arrived in the previous step, whose metrics are now logged."""
        self._stop(trainer)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Saves a checkpoint after an optimizer step if any rank has received a signal."""
        if self._agreed is not None or trainer.fit_loop._should_accumulate():
            return
        self._agreed = self._ask_all_ranks()
        if self._agreed is not None:
            for checkpoint in step_checkpoints(trainer.callbacks):
                checkpoint.save(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Completes the checkpoint before the last validation, which a second signal may end."""
        if self._agreed is not None:
            for checkpoint in step_checkpoints(trainer.callbacks):
                checkpoint.complete(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raises StopRun if a signal arrived in the last step, so that no evaluation follows.

        Without a signal, does nothing.
        """
        if self._agreed is None:
            self._agreed = self._ask_all_ranks()
        self._stop(trainer)
        self.signals.waits = False

    def _stop(self, trainer: pl.Trainer) -> None:
        if self._agreed is None:
            return
        for checkpoint in step_checkpoints(trainer.callbacks):
            checkpoint.save(trainer)
            checkpoint.complete(trainer)
        if self._agreed == signal.SIGUSR1 and self._requeues and Topology.of(trainer).is_first:
            requeue()
        raise StopRun(self._agreed, trainer.global_step)

    def _ask_all_ranks(self) -> int | None:
        """Returns the highest signal number that a rank has received; None if there is none."""
        flag = torch.tensor(self.signals.received or 0)
        return int(self._ranks.maximum(flag, self._group)) or None
