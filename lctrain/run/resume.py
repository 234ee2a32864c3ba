"""Finds the checkpoint from which a run resumes, by `ckpt_path`: a path, or "last"."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lctrain.run.folder import read_record
from lctrain.run.identity import differences
from lctrain.run.seal import DamagedCheckpointError, damage_of, is_checkpoint

log = logging.getLogger(__name__)

LAST = "last.ckpt"
IDENTITY_KEY = "run"  # key of the run's record in a checkpoint
NEEDED: dict[str, type] = {
    "state_dict": Mapping,
    "optimizer_states": list,
    "lr_schedulers": list,
    "loops": Mapping,
    "global_step": int,
    "pytorch-lightning_version": str,
}
"""Keys of a checkpoint of training, with the types of their values, which must not be empty."""


def find_checkpoint(
    ckpt_path: str | None,
    directories: Sequence[Path],
    runs_dir: Path,
    identity: Mapping[str, Any] | None = None,
) -> Path | None:
    """Finds the checkpoint that `ckpt_path` denotes.

    Args:
        ckpt_path: Path of a checkpoint; "last" for the newest one; None for a new run.
        directories: Directories of checkpoints that "last" searches first. They hold checkpoints if
            a run starts again in its own folder.
        runs_dir: Folder of earlier runs with the same name, which "last" searches next, the newest
            run first.
        identity: Identity of this run (see `lctrain.run.identity`); None skips the comparison with
            the checkpoint's identity.

    Returns:
        The intact checkpoint to resume from; None if `ckpt_path` is None.

    Raises:
        ValueError: if the checkpoint does not exist, is damaged, or belongs to another run.
    """
    if ckpt_path is None:
        return None
    if ckpt_path != "last":
        return check_named(Path(ckpt_path), identity)
    own = [path for directory in directories for path in checkpoints_in(directory)]
    if own:
        path = newest_intact(own)
        check_identity(path, identity)
        return path
    path = newest_intact(checkpoints_in(newest_directory(runs_dir, identity)))
    check_identity(path, identity)
    return path


def newest_directory(runs_dir: Path, identity: Mapping[str, Any] | None = None) -> Path:
    """Returns the directory of checkpoints of the newest run with this identity.

    Args:
        runs_dir: Folder of earlier runs with the same name.
        identity: Identity of this run; None accepts every run.

    Raises:
        ValueError: if no run has this identity; the message names the options in which the newest
            run differs.
    """
    runs = sorted(_directories(runs_dir), key=_age, reverse=True)
    for directory in runs:
        if identity is None or not differences(identity, identity_in(directory)):
            return directory
    if runs:
        changes = "; ".join(differences(identity or {}, identity_in(runs[0])))
        raise ValueError(
            f"ckpt_path=last needs a checkpoint of this run, got those of others below "
            f"{runs_dir.absolute()}. The newest, {checkpoints_in(runs[0])[0]}, differs: {changes}. "
            "Restore these options, or start a new run without ckpt_path."
        )
    raise ValueError(
        f"ckpt_path=last needs an earlier checkpoint, got none below {runs_dir.absolute()}. "
        "Leave ckpt_path out to start afresh, or give the path of a checkpoint."
    )


def check_named(path: Path, identity: Mapping[str, Any] | None) -> Path:
    """Checks a checkpoint that the user named, and returns its absolute path.

    Args:
        path: Path of the checkpoint.
        identity: Identity of this run; None skips the comparison.

    Raises:
        ValueError: if the file does not exist, is damaged, or belongs to another run.
    """
    path = path.expanduser()
    if path.is_dir() and not is_checkpoint(path):
        found = checkpoints_in(path) or checkpoints_in(path / "checkpoints")
        advice = f"Give its newest file, {found[0]}." if found else "It holds no checkpoint."
        raise ValueError(f"ckpt_path must be a file or last, got the folder {path}. {advice}")
    if not is_checkpoint(path):
        raise ValueError(
            f"ckpt_path must be a checkpoint file or last, got {str(path)!r}, which is not "
            "there. Leave it out to start afresh."
        )
    path = path.resolve()
    damage = damage_of(path)
    if damage is not None:
        others = (other for other in checkpoints_in(path.parent) if other != path)
        intact = next((other for other in others if damage_of(other) is None), None)
        advice = f"The newest intact one is {intact}." if intact else "Its folder has no other."
        raise DamagedCheckpointError(
            f"ckpt_path must be an intact checkpoint, got {path}, which is damaged: {damage}. "
            f"{advice}"
        )
    check_identity(path, identity)
    return path


def checkpoints_in(directory: Path) -> list[Path]:
    """Returns the checkpoints in a directory, newest first; of equal age, the higher step first."""
    last = directory / LAST
    newest = last.resolve() if last.exists() else None
    found = [path.resolve() for path in directory.glob("step-*.ckpt")]
    found.sort(key=lambda path: (path == newest, path.stat().st_mtime_ns, path.name), reverse=True)
    return found or ([last] if newest is not None else [])


def newest_intact(paths: Sequence[Path]) -> Path:
    """Returns the first intact checkpoint of a list, and warns about damaged ones before it.

    Raises:
        DamagedCheckpointError: if all checkpoints are damaged.
    """
    damages: list[str] = []
    for path in paths:
        damage = damage_of(path)
        if damage is None:
            for line in damages:
                log.warning("%s. Resuming from the newest intact checkpoint, %s.", line, path)
            return path
        damages.append(f"{path} is damaged: {damage}")
    raise DamagedCheckpointError(
        f"ckpt_path=last needs an intact checkpoint, got none: {'; '.join(damages)}. Start a new "
        "run without ckpt_path."
    )


def check_identity(path: Path, identity: Mapping[str, Any] | None) -> None:
    """Raises ValueError if a checkpoint belongs to another run; the message names the differences.

    Args:
        path: Path of an intact checkpoint.
        identity: Identity of this run; None checks only that it is a checkpoint of training.
    """
    from lctrain.run.checkpoint_file import read_checkpoint

    state = read_checkpoint(path, map_location="cpu", mmap=True)
    in_shards = ("state_dict", "optimizer_states") if path.is_dir() else ()
    missing = [
        key
        for key, kind in NEEDED.items()
        if key not in in_shards
        if not isinstance(state.get(key), kind) or state[key] in ({}, [])
    ]
    if missing:
        raise ValueError(
            f"ckpt_path must be a checkpoint of a training run, got {path} without "
            f"{', '.join(missing)}. Give a file that StepCheckpoint wrote; weights alone are "
            "loaded by model=hf model.name_or_path=FOLDER."
        )
    record = state.get(IDENTITY_KEY)
    then = record.get("identity", {}) if isinstance(record, Mapping) else {}
    changes = differences(identity or {}, then)
    if changes:
        raise ValueError(
            f"a resumed run must have the options of its checkpoint, got others than those of "
            f"{path}: {'; '.join(changes)}. Restore them, or start a new run without ckpt_path."
        )


def identity_in(checkpoints: Path) -> Mapping[str, Any]:
    """Returns the identity of the run that wrote a directory of checkpoints; {} if unknown."""
    record = read_record(checkpoints.parent) or {}
    identity = record.get("identity", {})
    return identity if isinstance(identity, dict) else {}


def run_folder_of(checkpoint: Path) -> Path | None:
    """Returns the run's folder that contains a checkpoint; None for a checkpoint elsewhere."""
    folder = checkpoint.resolve().parent.parent
    return folder if read_record(folder) is not None else None


def _directories(runs_dir: Path) -> Iterator[Path]:
    """Yields the directories below a folder of runs that contain checkpoints."""
    for directory in runs_dir.glob("**/checkpoints"):
        if checkpoints_in(directory):
            yield directory


def _age(directory: Path) -> float:
    """Returns the modification time of the newest checkpoint, in seconds since the epoch."""
    return checkpoints_in(directory)[0].stat().st_mtime
