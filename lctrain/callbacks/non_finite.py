"""NonFiniteLossGuard: stops the run at a NaN or infinite loss, or skips the optimizer step."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lctrain.callbacks.batches import BatchView, ReadBatch, view_batch
from lctrain.callbacks.checkpoint import StepCheckpoint
from lctrain.callbacks.targets import loss_of
from lctrain.distributed import Topology
from lctrain.distributed.sharding import local_part
from lctrain.log_steps import at_log_step

log = logging.getLogger(__name__)

SHOWN_DOCUMENTS = 8
ON_BATCH = ("stop", "skip")
NOTHING = 2  # state of a step without loss and gradient; 0 is not finite, 1 is finite


class NonFiniteLossError(RuntimeError):
    """Raised if the training loss or a weight has become NaN or infinite."""


@dataclass(frozen=True)
class _Loss:
    """One micro-batch whose loss is not checked yet.

    Attributes:
        index: Index of the micro-batch in the run.
        value: Loss of the micro-batch, 0-dim tensor on the device.
        batch: Documents of the micro-batch, for messages; its tokens are dropped.
    """

    index: int
    value: Tensor
    batch: BatchView

    def describe(self) -> str:
        """Returns the loss, the micro-batch's index and the names of its documents, as text."""
        names = self.batch.document_names()
        more = len(names) - SHOWN_DOCUMENTS
        shown = ", ".join(names[:SHOWN_DOCUMENTS]) + (f" and {more} more" if more > 0 else "")
        return f"{float(self.value)} in micro-batch {self.index}, documents: {shown}"


class NonFiniteLossGuard(pl.Callback):
    """Stops the run at a loss that is NaN or infinite, and names the documents of its batch.

    With on_batch="stop", losses stay on the device until a logging step or a checkpoint, and are
    then checked together. The run waits for the device at these points anyway.

    With on_batch="skip", the optimizer step is skipped instead. All ranks drop the gradients of the
    step, so weights and optimizer state do not change; the learning-rate schedule advances. This
    mode checks the loss and the gradients of every step, and waits for the device at every step.

    No checkpoint contains trained weights that are NaN or infinite: saving one raises
    NonFiniteLossError, even if all losses were finite. Frozen weights do not change, and may be
    quantized; they are not checked.

    Args:
        read_batch: Function from a batch to a PackedBatch or a mapping with transformers' names,
            from which documents are named; None if batches are one of them.
        on_batch: "stop", or "skip" to skip the optimizer step of a batch whose loss or gradient is
            not finite.
        max_in_a_row: Largest number of consecutive skipped steps; one more stops the run.

    Attributes:
        left_out: Number of skipped steps of the run, also before a resume.

    Raises:
        ValueError: if an argument is out of range; in training, if the batch cannot be read, or
            `training_step` of a module with manual optimization returns no loss.
    """

    def __init__(
        self,
        read_batch: ReadBatch | None = None,
        on_batch: str = "stop",
        max_in_a_row: int = 10,
    ) -> None:
        if on_batch not in ON_BATCH:
            raise ValueError(
                f"on_batch must be one of {', '.join(ON_BATCH)}, got {on_batch!r}. stop is the "
                "default."
            )
        if max_in_a_row < 1:
            raise ValueError(
                f"max_in_a_row must be at least 1, got {max_in_a_row}. on_batch=stop leaves out "
                "no step."
            )
        self.read_batch = read_batch
        self.on_batch = on_batch
        self.max_in_a_row = max_in_a_row
        self.left_out = 0
        self._in_a_row = 0
        self._pending: list[_Loss] = []
        self._step_losses: list[Tensor] = []
        self._skipped: dict[int, bool] = {}  # by optimizer step, of the current batch

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        """Keeps the loss of a micro-batch until the optimizer steps."""
        if self.on_batch == "skip":
            self._step_losses.append(loss.detach())

    def on_before_optimizer_step(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Drops the gradients of all ranks if a loss or gradient of any rank is not finite.

        Does nothing with on_batch="stop".
        """
        if self.on_batch != "skip":
            return
        losses, self._step_losses = self._step_losses, []
        gradients = [local_part(p.grad) for p in pl_module.parameters() if p.grad is not None]
        checks = [value.isfinite().all().to(pl_module.device) for value in [*losses, *gradients]]
        nothing = torch.tensor(NOTHING, dtype=torch.int32, device=pl_module.device)
        finite = torch.stack(checks).all().int() if checks else nothing
        agreed = int(Topology.of(trainer).minimum(finite))
        if agreed == NOTHING:
            return
        self._skipped[trainer.global_step] = agreed == 0
        if agreed == 0:
            for parameter in pl_module.parameters():
                parameter.grad = None  # optimizers skip parameters without a gradient

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Keeps the loss of the micro-batch, and checks all kept losses at logging steps.

        With on_batch="skip", counts the skipped steps instead.

        Raises:
            NonFiniteLossError: if a kept loss of any rank is not finite, or too many consecutive
                steps were skipped.
        """
        index = trainer.fit_loop.epoch_loop.total_batch_idx
        loss = loss_of(outputs)
        if loss is not None:
            view = view_batch(batch, self.read_batch).without_tokens()
            self._pending.append(_Loss(index, loss, view))
        elif not pl_module.automatic_optimization:
            raise ValueError(
                "NonFiniteLossGuard needs the loss of every batch, got none from training_step. "
                "Return it: {'loss': loss.detach()}."
            )
        if self.on_batch == "skip":
            self._count(trainer, pl_module)
        elif at_log_step(trainer):
            self._check_losses(trainer)

    def state_dict(self) -> dict[str, int]:
        """Returns the number of skipped steps, and of consecutive skipped steps."""
        return {"left_out": self.left_out, "in_a_row": self._in_a_row}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Restores both numbers of skipped steps from a checkpoint."""
        self.left_out, self._in_a_row = state_dict["left_out"], state_dict["in_a_row"]

    def _count(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Counts the skipped optimizer steps of a batch, and logs the documents of these steps.

        A batch without an optimizer step changes no count.

        Raises:
            NonFiniteLossError: if too many consecutive steps were skipped.
        """
        steps, self._skipped = self._skipped, {}
        if steps:
            pending, self._pending = self._pending, []
            for step, skipped in steps.items():
                self._in_a_row = self._in_a_row + 1 if skipped else 0
                if skipped:
                    self._leave_out(trainer, step + 1, pending)
        if at_log_step(trainer):
            pl_module.log("train/left_out_steps", float(self.left_out))

    def _leave_out(self, trainer: pl.Trainer, step: int, pending: list[_Loss]) -> None:
        """Counts and logs one skipped optimizer step.

        Args:
            trainer: The trainer.
            step: Number of the optimizer step, from 1.
            pending: Micro-batches since the last optimizer step.

        Raises:
            NonFiniteLossError: if too many consecutive steps were skipped.
        """
        self.left_out += 1
        bad = [loss for loss in pending if not _finite(loss.value)]
        what = bad[0].describe() if bad else "a gradient or a loss on some rank"
        log.warning("Step %d left out: not finite: %s.", step, what)
        if self._in_a_row > self.max_in_a_row:
            raise NonFiniteLossError(
                f"steps left out in a row must be at most {self.max_in_a_row}, got "
                f"{self._in_a_row}; the newest: {what}. {_remedy(trainer)}"
            )

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Checks the kept losses and all trained weights before a checkpoint is written.

        Raises:
            NonFiniteLossError: if a loss or a weight is not finite.
        """
        if self.on_batch == "stop":
            self._check_losses(trainer)
        weights = {
            name: local_part(value)
            for name, value in pl_module.named_parameters()
            if value.requires_grad
        }
        finite = [value.isfinite().all() for value in weights.values()]
        ranks = Topology.of(trainer)
        if finite and not bool(ranks.minimum(torch.stack(finite).all().int())):
            own = [name for name, value in weights.items() if not _finite(value)]
            names = next(found for found in ranks.gather(own) if found)
            raise NonFiniteLossError(
                f"weights became NaN or infinite at step {trainer.global_step} with finite losses "
                f"({', '.join(names[:SHOWN_DOCUMENTS])}). {_remedy(trainer)}"
            )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Checks the losses that were kept since the last logging step.

        Raises:
            NonFiniteLossError: if a loss is not finite.
        """
        if self.on_batch == "stop":
            self._check_losses(trainer)

    def _check_losses(self, trainer: pl.Trainer) -> None:
        """Checks the kept losses of all ranks, which waits for the device.

        Raises:
            NonFiniteLossError: on all ranks, if a loss of any rank is not finite.
        """
        pending, self._pending = self._pending, []
        if not pending:
            return
        finite = torch.stack([loss.value for loss in pending]).isfinite()
        ranks = Topology.of(trainer)
        if bool(ranks.minimum(finite.all().int())):
            return
        first = next(
            (loss for loss, ok in zip(pending, finite.tolist(), strict=True) if not ok), None
        )
        found = None if first is None else (first.index, ranks.rank, first.describe())
        _, rank, description = min(entry for entry in ranks.gather(found) if entry is not None)
        where = f" on rank {rank}" if ranks.size > 1 else ""
        raise NonFiniteLossError(f"training loss became {description}{where}. {_remedy(trainer)}")


def _finite(value: Tensor) -> bool:
    return bool(value.isfinite().all())


def _remedy(trainer: pl.Trainer) -> str:
    """Returns the end of an error message: the last checkpoint, and what to do."""
    checkpoints = [c for c in trainer.callbacks if isinstance(c, StepCheckpoint)]
    kept = [str(c.last_path) for c in checkpoints if c.last_path.exists()]
    last = f"The last good checkpoint is {kept[0]}." if kept else "There is no checkpoint yet."
    return f"{last} Look at these documents, or lower the learning rate or clip the gradients."
