"""StepCheckpoint: a checkpoint every n optimizer steps that an interruption cannot corrupt."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

LAST = "last.ckpt"
UNFINISHED = ".tmp"  # suffix of a checkpoint that is being written


class StepCheckpoint(Checkpoint):
    """Saves every n optimizer steps, in the middle of an epoch too, and at the end of training.

    `last.ckpt` is a link that always points to the newest complete checkpoint.

    Args:
        directory: Where the checkpoints go; made if it is not there.
        every_n_steps: Optimizer steps between two checkpoints.
        keep: Number of newest checkpoints that stay on disk.

    Raises:
        ValueError: if a number is below 1, and in `setup`, before any training, if the directory
            cannot be written.
    """

    def __init__(self, directory: str | Path, every_n_steps: int = 100, keep: int = 2) -> None:
        super().__init__()
        for name, value in (("every_n_steps", every_n_steps), ("keep", keep)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}. Choose a positive one.")
        self.directory = Path(directory).absolute()
        self.every_n_steps = every_n_steps
        self.keep = keep
        self._saved_step = -1

    @property
    def last_path(self) -> Path:
        """The link to the newest checkpoint."""
        return self.directory / LAST

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Fails if the directory cannot be written; deletes what a killed run left half written."""
        if trainer.is_global_zero:
            check_writable(self.directory)
            for unfinished in self.directory.glob(f"step-*.ckpt{UNFINISHED}"):
                unfinished.unlink(missing_ok=True)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Does not save anew what was just resumed from."""
        self._saved_step = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Saves if an optimizer step was taken and it is one of the n-th, or the last."""
        step = trainer.global_step
        if step % self.every_n_steps == 0 or step == trainer.max_steps:
            self._save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves the end of training."""
        self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        """Writes the checkpoint of this step unless it is there, and turns the link to it."""
        step = trainer.global_step
        if step == self._saved_step or trainer.fast_dev_run:
            return
        path = self.directory / f"step-{step:08d}.ckpt"
        trainer.save_checkpoint(path)
        self._saved_step = step
        if trainer.is_global_zero:
            link = self.last_path.with_suffix(".link")
            link.unlink(missing_ok=True)
            link.symlink_to(path.name)
            os.replace(link, self.last_path)
            for old in sorted(self.directory.glob("step-*.ckpt"))[: -self.keep]:
                if old != path:
                    old.unlink()
        trainer.strategy.barrier("StepCheckpoint")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, flushes to disk, then renames: never half a checkpoint."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Writes `checkpoint` to `path` at once."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(target.name + UNFINISHED)
        with temporary.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads a checkpoint to the CPU; the strategy moves what belongs on a device."""
        location = (lambda storage, _: storage) if map_location is None else map_location
        loaded: Mapping[str, Any] = torch.load(
            path, map_location=location, weights_only=bool(weights_only)
        )
        return dict(loaded)


def check_writable(directory: Path) -> None:
    """Raises ValueError if no file can be created in `directory`, which is made if needed."""
    probe = directory / f".writable-{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"checkpoint directory must be writable, got {directory} ({error.strerror}). Set "
            "paths.output_dir or callbacks.checkpoint.directory to a folder that you may write to."
        ) from error


def find_checkpoint(
    ckpt_path: str | None, callbacks: Sequence[pl.Callback], runs_dir: Path
) -> Path | None:
    """Resolves `ckpt_path` of a run.

    Args:
        ckpt_path: None, a path, or "last".
        callbacks: "last" is looked for in the directory of their StepCheckpoint first: a run that
            is started again in the same folder.
        runs_dir: Folder of earlier runs of the same name: then the newest of theirs.

    Returns:
        The checkpoint to resume from, or None to start afresh.

    Raises:
        ValueError: if there is no such checkpoint.
    """
    if ckpt_path is None:
        return None
    if ckpt_path != "last":
        if not Path(ckpt_path).is_file():
            raise ValueError(
                f"ckpt_path must be a checkpoint file or last, got {ckpt_path!r}, which is not "
                "there. Leave it out to start afresh."
            )
        return Path(ckpt_path).absolute()
    own = [c.last_path for c in callbacks if isinstance(c, StepCheckpoint)]
    candidates = [path for path in own if path.is_file()]
    if not candidates:
        candidates = [path for path in runs_dir.glob(f"**/checkpoints/{LAST}") if path.is_file()]
    if not candidates:
        raise ValueError(
            f"ckpt_path=last needs an earlier checkpoint, got none below {runs_dir.absolute()}. "
            "Leave ckpt_path out to start afresh, or give the path of a checkpoint."
        )
    return max(candidates, key=lambda path: path.stat().st_mtime).resolve()
