"""StepBudget: chooses the number of optimizer steps that fit into a given time."""

from __future__ import annotations

import logging
import time
from typing import Any

import lightning.pytorch as pl
import torch
from torch.optim.lr_scheduler import LambdaLR

from lctrain.distributed import Topology
from lctrain.instances import require_instance
from lctrain.optim import follow_schedule, learning_rate_factor
from lctrain.pluralize import pluralize
from lctrain.run.folder import RunFolder

log = logging.getLogger(__name__)

UNTIMED_STEPS = 3  # first steps, which are slower: kernels compile and memory is allocated
FEWEST_TIMED_STEPS = 8
TIMED_SHARE = 0.05  # fraction of the budget in which steps are timed, if enough steps fit
KEY = "budget_steps"  # key in run.json
CHOICE_KEY = "budget_chosen_at"


class StepBudget(pl.Callback):
    """Times the first optimizer steps, then sets `trainer.max_steps` so that training ends in time.

    From then on, the learning-rate schedule of LongContextModule follows the new number of steps.

    The number is chosen once per run, by rank 0. Checkpoints and `run.json` store the number, and
    the step at which it was chosen. A resumed run reads both. Even if it resumes from an earlier
    step, it changes its schedule at the same step again, so learning rates repeat.

    Args:
        seconds: Seconds from `started` to the end of training, without the validations in between.
        started: `time.monotonic()` at the start of the run; None for the start of training.
        folder: Folder of the run, whose `run.json` stores the number of steps; None does not store
            it.

    Raises:
        ValueError: if `seconds` is not above 0.

    Attributes:
        max_steps: Number of optimizer steps of the run; None until it is chosen.
        chosen_at: Number of optimizer steps that had been taken when `max_steps` was chosen.
    """

    def __init__(
        self, seconds: float, started: float | None = None, folder: RunFolder | None = None
    ) -> None:
        require_instance("seconds", seconds, (int, float), "Pass the time until training ends.")
        if not seconds > 0:
            raise ValueError(
                f"seconds must be above 0, got {seconds}. It is the time until training ends."
            )
        self.seconds = seconds
        record = {} if folder is None else folder.record
        self.max_steps: int | None = record.get(KEY)
        self.chosen_at: int = record.get(CHOICE_KEY, 0)
        self._started = started
        self._folder = folder
        self._timed_from: tuple[int, float] | None = None
        self._waits = False  # max_steps is known, but the step `chosen_at` is not reached yet

    def state_dict(self) -> dict[str, Any]:
        """Returns the number of steps, and the step at which it was chosen."""
        return {"max_steps": self.max_steps, "chosen_at": self.chosen_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the number of steps, if it was chosen before the checkpoint."""
        if state_dict["max_steps"] is not None:
            self.max_steps = state_dict["max_steps"]
            self.chosen_at = state_dict.get("chosen_at", 0)  # older checkpoints lack it

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sets max_steps of a resumed run before Lightning checks whether the run has ended."""
        self._waits = False
        if self.max_steps is None:
            return
        if 0 < trainer.max_steps < self.max_steps:
            return  # the user has shortened the run
        trainer.fit_loop.epoch_loop.max_steps = self.max_steps
        self._waits = True
        if Topology.of(trainer).is_first:
            log.info(
                "The run takes %s, the number that it chose for its budget of time. "
                "trainer.budget_s=null takes trainer.max_steps instead.",
                pluralize(self.max_steps, "step"),
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock if `started` is None, and adapts the schedule of a resumed run."""
        self._follow(trainer, pl_module)
        self._timed_from = None
        if self._started is None:
            self._started = time.monotonic()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Times the first optimizer steps, then chooses the number of steps."""
        if trainer.fit_loop._should_accumulate():
            return
        if self.max_steps is not None:
            self._follow(trainer, pl_module)
            return
        step = trainer.global_step
        if self._timed_from is None:
            if step >= UNTIMED_STEPS:
                self._timed_from = step, _now(pl_module.device)
            return
        first, since = self._timed_from
        timed = step - first
        if not self._enough(trainer, timed, since):
            return
        now = _now(pl_module.device)
        assert self._started is not None
        fitting = steps_that_fit(step, now - self._started, (now - since) / timed, self.seconds)
        self._choose(trainer, pl_module, trainer.strategy.broadcast(fitting))

    def _follow(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Changes the schedule of a resumed run, once the step `chosen_at` is reached."""
        if self._waits and trainer.global_step >= self.chosen_at:
            assert self.max_steps is not None
            set_max_steps(trainer, module, self.max_steps)
            self._waits = False

    def _enough(self, trainer: pl.Trainer, timed: int, since: float) -> bool:
        """Whether enough steps were timed; rank 0's clock decides for all ranks."""
        if timed < FEWEST_TIMED_STEPS:
            return False
        enough = time.monotonic() - since >= TIMED_SHARE * self.seconds
        return bool(trainer.strategy.broadcast(enough))

    def _choose(self, trainer: pl.Trainer, module: pl.LightningModule, fitting: int) -> None:
        """Sets the number of steps of the run, at most `trainer.max_steps`, and stores it.

        Args:
            trainer: The trainer inside `fit`.
            module: The module in training.
            fitting: Number of optimizer steps that fit into the time, from the beginning of the
                run.
        """
        options = getattr(module, "optim", None)
        warmup = getattr(options, "warmup_steps", None) or 0
        most = trainer.max_steps if trainer.max_steps > 0 else fitting
        self.max_steps = min(max(fitting, warmup, trainer.global_step + 1), max(most, 1))
        self.chosen_at = trainer.global_step
        set_max_steps(trainer, module, self.max_steps)
        if Topology.of(trainer).is_first:
            log.info(
                "%s of training fit into the %g s of trainer.budget_s; the run takes %s.",
                pluralize(fitting, "step"),
                self.seconds,
                f"{self.max_steps:,}",
            )
            if self._folder is not None:
                self._folder.note(CHOICE_KEY, self.chosen_at)
                self._folder.note(KEY, self.max_steps)


def steps_that_fit(done: int, spent: float, step_seconds: float, budget: float) -> int:
    """Returns the number of optimizer steps, from the beginning of a run, that fit into a time.

    Args:
        done: Number of steps that have been taken.
        spent: Seconds since the start of the run.
        step_seconds: Seconds that one further step takes.
        budget: Seconds from the start of the run to the end of training.
    """
    return done + max(0, int((budget - spent) / max(step_seconds, 1e-9)))


def set_max_steps(trainer: pl.Trainer, module: pl.LightningModule, max_steps: int) -> None:
    """Changes the number of steps of a run, and the schedules of a LongContextModule.

    Args:
        trainer: The trainer inside `fit`.
        module: Module of the run; only the schedule of a LongContextModule changes.
        max_steps: Number of optimizer steps of the whole run.
    """
    trainer.fit_loop.epoch_loop.max_steps = max_steps
    options = getattr(module, "optim", None)
    if options is None:
        return
    for config in trainer.lr_scheduler_configs:
        if isinstance(config.scheduler, LambdaLR):
            factor = learning_rate_factor(options, max_steps)
            config.scheduler.lr_lambdas = [factor] * len(config.scheduler.lr_lambdas)
            follow_schedule(config.scheduler)


def _now(device: torch.device) -> float:
    """Returns the time in seconds, after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()
