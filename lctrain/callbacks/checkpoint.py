"""StepCheckpoint: saves a checkpoint every n optimizer steps, safe against interruptions."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint

from lctrain.distributed import Topology
from lctrain.instances import require_instance, require_int
from lctrain.run.checkpoint_file import AtomicCheckpointIO
from lctrain.run.folder import remove_unfinished
from lctrain.run.resume import LAST, checkpoints_in
from lctrain.run.seal import remove
from lctrain.run.storage import storage_error

__all__ = ["AtomicCheckpointIO", "StepCheckpoint", "check_writable", "step_checkpoints"]

log = logging.getLogger(__name__)

UNFINISHED = ".tmp"  # suffix of a checkpoint whose step's metrics are not logged yet
# Error numbers of a file system that has no symbolic links.
NO_LINKS = (errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class StepCheckpoint(Checkpoint):
    """Saves a checkpoint every n optimizer steps, also within an epoch, and after the last step.

    At the end of a step, the checkpoint is written under a temporary name. It gets its final name
    after the step's metrics are logged and the validation after the step, if any, has run. If the
    run is killed in between, it resumes from the previous checkpoint, so the logged metrics have no
    gap. `last.ckpt` is a symbolic link to the newest complete checkpoint, if the file system
    supports links.

    Args:
        directory: Folder of the checkpoints; created if it does not exist.
        every_n_steps: Optimizer steps between two checkpoints.
        keep: Number of newest checkpoints to keep. If the run resumed from an older checkpoint, the
            checkpoints of later steps are deleted.

    Raises:
        ValueError: if a number is below 1. In `setup`, before training: if the directory is not
            writable.
        StorageError: on all ranks, if a checkpoint cannot be written. The unfinished file is
            deleted.
    """

    def __init__(self, directory: str | Path, every_n_steps: int = 100, keep: int = 2) -> None:
        super().__init__()
        require_instance("directory", directory, (str, Path), "Pass the folder of the checkpoints.")
        for name, value in (("every_n_steps", every_n_steps), ("keep", keep)):
            require_int(name, value, 1, "Choose a positive one.")
        self.directory = Path(directory).expanduser().absolute()
        self.every_n_steps = every_n_steps
        self.keep = keep
        self._saved_step = -1
        self._pending: Path | None = None
        self._has_links = True

    @property
    def last_path(self) -> Path:
        """Path of the link `last.ckpt`, or of the newest checkpoint if there is no link."""
        link = self.directory / LAST
        return link if link.exists() else next(iter(checkpoints_in(self.directory)), link)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Checks that the directory is writable, and deletes unfinished files of killed runs.

        Raises:
            ValueError: if the directory is not writable, or another StepCheckpoint uses it.
        """
        others = [other for other in step_checkpoints(trainer.callbacks) if other is not self]
        if any(other.directory.resolve() == self.directory.resolve() for other in others):
            raise ValueError(
                f"callbacks must hold one StepCheckpoint per directory, got two for "
                f"{self.directory}. Remove one, or give it another directory."
            )
        if Topology.of(trainer).is_first:
            check_writable(self.directory)
            remove_unfinished(self.directory)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stores the step at which the run starts or resumes, so that it is not saved again."""
        self._saved_step = trainer.global_step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Completes the checkpoint of the previous step, whose metrics are logged by now."""
        self.complete(trainer)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Saves a checkpoint after every n-th optimizer step and after the last step."""
        step = trainer.global_step
        if step % self.every_n_steps == 0 or step == trainer.max_steps:
            self.save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves and completes the checkpoint of the last step."""
        self.save(trainer)
        self.complete(trainer)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Gives the checkpoint that is already written its final name, after an error of a rank."""
        pending, self._pending = self._pending, None
        if pending is not None and Topology.of(trainer).is_first:  # others may not come here
            self._publish(pending)

    def save(self, trainer: pl.Trainer) -> None:
        """Writes a checkpoint of this optimizer step under a temporary name, unless it exists.

        All ranks must call this method, at the end of a training batch. `complete` gives the file
        its final name.
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
            trainer.strategy.barrier("Trainer.save_checkpoint")  # which the other ranks wait for
        _raise_on_all_ranks(trainer, error, f"the checkpoint of step {step}", self)
        self._saved_step = step
        self._pending = path

    def complete(self, trainer: pl.Trainer) -> None:
        """Gives a written checkpoint its final name, links last.ckpt to it, deletes old ones.

        All ranks must call this method.

        Raises:
            StorageError: on all ranks, if the first rank cannot rename or link it.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        error: OSError | None = None
        if Topology.of(trainer).is_first:
            try:
                self._publish(pending)
            except OSError as caught:
                error = caught
        _raise_on_all_ranks(trainer, error, f"the checkpoint of step {_step_of(pending)}", self)

    def _publish(self, pending: Path) -> None:
        """Renames and links a written checkpoint, and deletes old ones; on the first rank."""
        path = pending.with_suffix("")
        if path.is_dir() or pending.is_dir():  # os.replace cannot replace a folder
            remove(path)
        os.replace(pending, path)
        self._link(path)
        step = _step_of(path)
        found = sorted(self.directory.glob("step-*.ckpt"), key=_step_of)
        later = [old for old in found if _step_of(old) > step]
        for old in [*[old for old in found if old not in later][: -self.keep], *later]:
            try:
                remove(old)
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
    """Returns the StepCheckpoints among the callbacks."""
    return [callback for callback in callbacks if isinstance(callback, StepCheckpoint)]


def check_writable(directory: Path) -> None:
    """Raises a ValueError if no file can be created in a directory.

    Args:
        directory: The directory; created if it does not exist.
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
    """Returns the step in the file name of a checkpoint; -1 if the name has no step."""
    number = path.name.removeprefix("step-").partition(".")[0]
    return int(number) if number.isdigit() else -1


def _raise_on_all_ranks(
    trainer: pl.Trainer, error: OSError | None, what: str, checkpoint: StepCheckpoint
) -> None:
    """Raises rank 0's error on every rank, so that no rank waits in a collective.

    Args:
        trainer: The trainer.
        error: The error on this rank; None if there is none.
        what: What could not be written, for the message.
        checkpoint: The callback, whose directory is named in the message.

    Raises:
        StorageError: if the first rank has an error.
    """
    found = Topology.of(trainer).of_first(None if error is None else (error.errno, str(error)))
    if found is None:
        return
    number, message = found
    newest = next(iter(checkpoints_in(checkpoint.directory)), None)
    then = (
        "start anew: there is no checkpoint yet"
        if newest is None
        else f"go on from {newest.name} with ckpt_path=last"
    )
    failed = OSError(number, message) if number is not None else OSError(message)
    raise storage_error(failed, what, checkpoint.directory, then) from error
