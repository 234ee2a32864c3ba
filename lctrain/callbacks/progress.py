"""TokenProgressBar: one progress bar over the optimizer steps of the whole run."""

from __future__ import annotations

import sys
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from lctrain.callbacks.targets import loss_of
from lctrain.callbacks.throughput import ThroughputMonitor
from lctrain.log_steps import at_log_step

SMOOTHING_STEPS = 20  # time constant of the running mean of the loss, in optimizer steps


class RunningMean:
    """An exponential running mean of 0-dim tensors, kept on their device.

    The first SMOOTHING_STEPS values have equal weights.

    Attributes:
        value: The mean, a 0-dim tensor; None before the first value.
    """

    def __init__(self) -> None:
        self.value: Any = None
        self._count = 0

    def add(self, value: Any) -> None:
        """Adds one value to the mean; None is ignored."""
        if value is None:
            return
        self._count += 1
        weight = max(1 / self._count, 1 / SMOOTHING_STEPS)
        self.value = value if self.value is None else self.value + weight * (value - self.value)


class TokenProgressBar(ProgressBar):
    """Shows optimizer steps, the loss, and tokens per second, which exclude padding.

    The loss is a running mean, since the loss of one step depends on its documents. Loss and speed
    are refreshed at logging steps only, so that the bar does not wait for the device at other
    steps.

    Args:
        refresh_rate: Optimizer steps between two refreshes; 0 hides the bar.
    """

    def __init__(self, refresh_rate: int = 1) -> None:
        super().__init__()
        self._refresh_rate = refresh_rate
        self._enabled = refresh_rate > 0
        self._bar: Any = None
        self._validation_bar: Any = None
        self._average = RunningMean()
        self._averaged_steps = 0

    def disable(self) -> None:
        """Hides the bar; Lightning calls this method on all ranks except the first."""
        self._enabled = False

    def enable(self) -> None:
        """Shows the bar."""
        self._enabled = self._refresh_rate > 0

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Prints above the bar."""
        tqdm.write(kwargs.pop("sep", " ").join(map(str, args)))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Opens the bar at the optimizer step at which the run starts or resumes."""
        total = trainer.estimated_stepping_batches
        self._bar = self._open(
            "training", None if total == float("inf") else int(total), trainer.global_step
        )
        self._averaged_steps = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Advances the bar by the optimizer steps taken; refreshes the loss at logging steps."""
        if self._bar.disable:
            return
        if trainer.global_step > self._averaged_steps:  # once an optimizer step
            self._averaged_steps = trainer.global_step
            self._average.add(newest_loss(trainer, pl_module, outputs))
        if at_log_step(trainer):
            self._bar.set_postfix_str(_postfix(trainer, self._average.value), refresh=False)
        if trainer.max_steps > 0:
            self._bar.total = trainer.max_steps  # StepBudget may have changed it
        if trainer.global_step >= self._bar.n + self._refresh_rate:
            self._bar.update(trainer.global_step - self._bar.n)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Closes the bar."""
        self._bar.update(trainer.global_step - self._bar.n)
        self._bar.close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Closes the bar, so that the error is readable."""
        if self._bar is not None:
            self._bar.close()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Opens a bar over the held-out packs."""
        packs = sum(trainer.num_val_batches)
        total = None if packs == float("inf") else int(packs)
        self._validation_bar = self._open("held-out loss", total, 0, leave=False, unit="pack")

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Advances the validation bar by one pack."""
        self._validation_bar.update(1)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Closes the validation bar."""
        self._validation_bar.close()

    def _open(
        self, title: str, total: int | None, initial: int, leave: bool = True, unit: str = "step"
    ) -> Any:
        """Opens a bar, which is refreshed often in a terminal and rarely in a log file.

        Args:
            title: Text in front of the bar.
            total: Number of units at the end; None if unknown.
            initial: Number of units that are done already.
            leave: Whether the bar stays visible after it is closed.
            unit: Name of the unit that the bar counts.
        """
        return tqdm(
            desc=title,
            total=total,
            initial=initial,
            unit=unit,
            leave=leave,
            dynamic_ncols=True,
            disable=not self._enabled,
            mininterval=0.2 if sys.stderr.isatty() else 10.0,
        )


def newest_loss(trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any) -> Any:
    """Returns the loss per token of the last optimizer step, 0-dim; None if there is none.

    LongContextModule and TokenExactLoss store this loss in `last_loss`. Without them, the result is
    the loss that `training_step` returned for the last micro-batch.

    Args:
        trainer: The trainer.
        pl_module: The module in training.
        outputs: Argument `outputs` of on_train_batch_end.
    """
    known = [getattr(c, "last_loss", None) for c in (pl_module, *trainer.callbacks)]
    loss = next((loss for loss in known if loss is not None), None)
    if loss is None:
        loss = loss_of(outputs)
        if loss is not None and pl_module.automatic_optimization:  # Lightning has divided it
            loss = loss * trainer.accumulate_grad_batches
    return loss


def _postfix(trainer: pl.Trainer, loss: Any) -> str:
    """Returns the loss and the tokens per second as text for the bar."""
    parts = [] if loss is None else [f"loss {float(loss):.3f}"]
    for callback in trainer.callbacks:
        if isinstance(callback, ThroughputMonitor) and callback.latest.seconds > 0:
            parts.append(f"{callback.latest.tokens_per_second:,.0f} tokens/s")
    return ", ".join(parts)
