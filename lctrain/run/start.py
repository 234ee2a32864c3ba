"""Chooses and locks the folder of a run: a new folder, or the folder of the run that it resumes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lctrain.run.folder import RunFolder, read_record, remove_orphans
from lctrain.run.rank import is_rank_zero
from lctrain.run.slurm import slurm_job

if TYPE_CHECKING:
    from lctrain.config import TrainConfig


def folder_to_go_on_in(config: TrainConfig, identity: Mapping[str, Any]) -> Path | None:
    """Returns the folder of the run to resume.

    Args:
        config: Config of this run. Its `paths.output_dir` is a new folder.
        identity: Identity of this run.

    Returns:
        The folder; None for a new run, or if the checkpoint is not in a run's folder.

    Raises:
        ValueError: if `ckpt_path` names no usable checkpoint of this run.
    """
    from lctrain.run.resume import find_checkpoint, run_folder_of

    if config.ckpt_path is None:
        return requeued_folder(Path(config.paths.runs_dir))
    found = find_checkpoint(config.ckpt_path, [], Path(config.paths.runs_dir), identity)
    return None if found is None else run_folder_of(found)


@contextmanager
def without_empty_folder(folder: str) -> Iterator[None]:
    """Context manager that deletes the empty folder that Hydra created, after an error."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            Path(folder).rmdir()
        raise


def was_requeued() -> bool:
    """Whether SLURM has requeued this job."""
    return os.environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")


def requeued_folder(runs_dir: Path) -> Path | None:
    """Returns the folder in which this SLURM job ran before it was requeued.

    It is None if the job was not requeued, or the run wrote no checkpoint.
    """
    from lctrain.run.resume import checkpoints_in

    if not was_requeued():
        return None
    for record in runs_dir.glob("*/run.json"):
        started = read_record(record.parent) or {}
        if started.get("slurm_job") == slurm_job() and checkpoints_in(
            record.parent / "checkpoints"
        ):
            return record.parent
    return None


def claim_folder(
    folder: Path,
    checkpoint: Path | None,
    identity: Mapping[str, Any],
    runs_dir: Path,
    others: Sequence[Path] = (),
) -> RunFolder:
    """Creates or reopens the folder of a run, and locks it.

    Args:
        folder: Folder of the run.
        checkpoint: Checkpoint to resume from; None for a new run. If it lies in `folder` or in one
            of `others`, `folder` is reopened.
        identity: Identity of this run.
        runs_dir: Folder of all runs with this name. Half-written checkpoints in it are deleted.
        others: Other folders that the run writes to, which are locked as well.

    Returns:
        The locked folder, which is a context manager.

    Raises:
        ValueError: if `folder` contains another run, or another run has locked one of the folders.
    """
    goes_on = checkpoint is not None and (
        folder.resolve() in checkpoint.resolve().parents
        or any(other.resolve() == checkpoint.resolve().parent for other in others)
    )
    claimed = (RunFolder.reopen if goes_on else RunFolder.create)(folder, "train", identity)
    try:
        for other in others:
            claimed.hold(other)
        remove_orphans(runs_dir)
        if checkpoint is not None and not goes_on:
            _copy_metrics(checkpoint, folder)
    except BaseException:
        claimed.close()
        raise
    return claimed


def _copy_metrics(checkpoint: Path, folder: Path) -> None:
    """Copies metrics.csv of the resumed run, for a run that continues in another folder.

    The logger then replaces the rows from the checkpoint's step on.
    """
    from lctrain.run.resume import run_folder_of

    earlier = run_folder_of(checkpoint)
    if earlier is not None and is_rank_zero() and (earlier / "metrics.csv").is_file():
        shutil.copyfile(earlier / "metrics.csv", folder / "metrics.csv")
