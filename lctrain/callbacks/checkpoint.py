"""StepCheckpoint: a checkpoint every n optimizer steps that an interruption cannot corrupt."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.callbacks import Checkpoint

from lctrain.run.checkpoint_file import AtomicCheckpointIO
from lctrain.run.folder import ORPHANS
from lctrain.run.resume import LAST, checkpoints_in
from lctrain.run.storage import storage_error

__all__ = ["AtomicCheckpointIO", "StepCheckpoint", "check_writable", "step_checkpoints"]

log = logging.getLogger(__name__)

UNFINISHED = ".tmp"  # suffix of a checkpoint whose step is not logged yet
NO_LINKS = (errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class StepCheckpoint(Checkpoint):
    """Saves every n optimizer steps, in the middle of an epoch too, and at the end of training.

    A checkpoint is written when its step ends, and gets its name once that step's metrics are
    logged and a validation that is due has run: a run that is killed in between resumes from the
    checkpoint before, and no row of the metrics is missing. `last.ckpt` is a link that always
    points to the newest complete checkpoint, where the file system has links.

    Args:
        directory: Folder of the checkpoints; created if it does not exist.
        every_n_steps: Optimizer steps between two checkpoints.
        keep: Number of newest checkpoints that stay on disk. Those of later steps, from which the
            run has gone back, are deleted.

    Raises:
        ValueError: if a number is below 1, and in `setup`, before any training, if the directory
            cannot be written.
        StorageError: on all ranks, if a checkpoint cannot be written; nothing is left of it.
    """

    def __init__(self, directory: str | Path, every_n_steps: int = 100, keep: int = 2) -> None:
        super().__init__()
        for name, value in (("every_n_steps", every_n_steps), ("keep", keep)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}. Choose a positive one.")
        self.directory = Path(directory).expanduser().absolute()
        self.every_n_steps = every_n_steps
        self.keep = keep
        self._saved_step = -1
        self._pending: Path | None = None
        self._has_links = True

    @property
    def last_path(self) -> Path:
        """Path of the link to the newest checkpoint; without links, of that checkpoint."""
        link = self.directory / LAST
        return link if link.exists() else next(iter(checkpoints_in(self.directory)), link)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Raises if the directory cannot be written; deletes the temporary files of killed runs."""
        if trainer.is_global_zero:
            check_writable(self.directory)
            for pattern in ORPHANS:
                for unfinished in self.directory.glob(pattern):
                    unfinished.unlink(missing_ok=True)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remembers the step of a resumed checkpoint, so as not to save it again."""
        self._saved_step = trainer.global_step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Completes the checkpoint of the previous step, whose metrics are logged."""
        self.complete(trainer)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Saves after every n-th optimizer step and after the last one."""
        step = trainer.global_step
        if step % self.every_n_steps == 0 or step == trainer.max_steps:
            self.save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves the end of training."""
        self.save(trainer)
        self.complete(trainer)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Completes a written checkpoint after an error."""
        self.complete(trainer)

    def save(self, trainer: pl.Trainer) -> None:
        """Writes the state after this step, unless it is written; `complete` names it.

        All ranks call it, at the end of a training batch.
        """
        step = trainer.global_step
        if step == self._saved_step or trainer.fast_dev_run:
            return
        self.complete(trainer)
        path = self.directory / f"step-{step:08d}.ckpt{UNFINISHED}"
        error: OSError | None = None
        try:
            trainer.save_checkpoint(path)
        except OSError as caught:
            error = caught
            trainer.strategy.barrier("Trainer.save_checkpoint")  # where the other ranks wait
        _raise_on_all_ranks(trainer, error, f"the checkpoint of step {step}", self)
        self._saved_step = step
        self._pending = path

    def complete(self, trainer: pl.Trainer) -> None:
        """Renames a written checkpoint, points the link `last.ckpt` to it, and deletes old ones."""
        pending, self._pending = self._pending, None
        if pending is None or not trainer.is_global_zero:
            return
        path = pending.with_suffix("")
        os.replace(pending, path)
        self._link(path)
        step = _step_of(path)
        found = sorted(self.directory.glob("step-*.ckpt"), key=_step_of)
        later = [old for old in found if _step_of(old) > step]
        for old in [*[old for old in found if old not in later][: -self.keep], *later]:
            try:
                old.unlink()
            except OSError as error:
                log.warning("The old checkpoint %s could not be deleted: %s", old, error.strerror)

    def _link(self, path: Path) -> None:
        """Points the link `last.ckpt` to a checkpoint."""
        if not self._has_links:
            return
        link = self.directory / "last.link"
        try:
            link.unlink(missing_ok=True)
            link.symlink_to(path.name)
            os.replace(link, self.directory / LAST)
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            self._has_links = False
            log.warning(
                "%s has no links, so there is no %s; ckpt_path=last finds the newest checkpoint "
                "all the same.",
                self.directory,
                LAST,
            )


def step_checkpoints(callbacks: Sequence[pl.Callback]) -> list[StepCheckpoint]:
    """Returns the callbacks that save checkpoints."""
    return [callback for callback in callbacks if isinstance(callback, StepCheckpoint)]


def check_writable(directory: Path) -> None:
    """Raises ValueError if no file can be created in `directory`.

    Creates the directory if needed.
    """
    probe = directory / f".writable-{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"\0")
        probe.unlink()
    except OSError as error:
        if probe.parent.is_dir():
            probe.unlink(missing_ok=True)
        raise ValueError(
            f"checkpoint directory must be writable, got {directory} ({error.strerror}). Set "
            "paths.output_dir or callbacks.checkpoint.directory to a folder that you may write to."
        ) from error


def _step_of(path: Path) -> int:
    """The step in the name of a checkpoint; -1 if it has none."""
    number = path.name.removeprefix("step-").partition(".")[0]
    return int(number) if number.isdigit() else -1


def _raise_on_all_ranks(
    trainer: pl.Trainer, error: OSError | None, what: str, checkpoint: StepCheckpoint
) -> None:
    """Raises what happened on the first rank on every rank, so that none waits for it."""
    found: list[tuple[int | None, str] | None] = [
        None if error is None else (error.errno, str(error))
    ]
    if trainer.world_size > 1:
        dist.broadcast_object_list(found, src=0)
    if found[0] is None:
        return
    number, message = found[0]
    newest = next(iter(checkpoints_in(checkpoint.directory)), None)
    then = (
        "start anew: there is no checkpoint yet"
        if newest is None
        else f"go on from {newest.name} with ckpt_path=last"
    )
    failed = OSError(number, message) if number is not None else OSError(message)
    raise storage_error(failed, what, checkpoint.directory, then) from error
