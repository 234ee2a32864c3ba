"""RunFolder: the folder of one run, which is locked while the run is active."""

from __future__ import annotations

import datetime
import json
import logging
import os
import secrets
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from lctrain.run.lock import FolderLock, is_locked
from lctrain.run.rank import is_rank_zero
from lctrain.run.seal import remove
from lctrain.run.slurm import slurm_job

log = logging.getLogger(__name__)

RECORD = "run.json"
CHECKPOINTS = "checkpoints/step-*.ckpt"
TRACES = (RECORD, "metrics.csv", CHECKPOINTS)
ORPHANS = ("step-*.ckpt.tmp", "step-*.ckpt.writing", "step-*.ckpt.tmp.writing", "last.link")


class RunFolder:
    """The folder of one run, which is locked until `close`.

    The file `run.json` in the folder describes the run. Only rank 0 locks the folder.

    Attributes:
        path: Path of the folder.
        record: Contents of `run.json`: id, kind and identity of the run, and time, command line,
            host and process id of its start.
    """

    def __init__(self, path: Path, record: dict[str, Any], lock: FolderLock | None) -> None:
        """Stores the attributes; callers use `create` or `reopen`."""
        self.path = path
        self.record = record
        self._locks = [] if lock is None else [lock]
        self._is_new = False

    @property
    def id(self) -> str:
        """Id of the run, which is also its id in Weights and Biases."""
        return str(self.record["id"])

    @classmethod
    def create(cls, path: Path, kind: str, identity: Mapping[str, Any]) -> RunFolder:
        """Creates and locks the folder of a new run. An existing folder must not contain a run.

        Args:
            path: Path of the folder.
            kind: "train" or "eval".
            identity: Options that a resumed run must not change: see `identity_of`.

        Raises:
            ValueError: if the folder contains a run.
            FolderInUseError: if another process has locked the folder.
        """
        record = _new_record(kind, identity)
        if not is_rank_zero():
            return cls(path, record, None)
        path.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(path)
        try:
            found = next((file for trace in TRACES for file in path.glob(trace)), None)
            if found is not None:
                goes_on = kind == "train" and any(path.glob(CHECKPOINTS))
                advice = "Go on with that run by ckpt_path=last" if goes_on else "Move it"
                raise ValueError(
                    f"paths.output_dir must be a folder without a run, got {path}, which holds "
                    f"{found.relative_to(path)}. {advice}, or choose another folder."
                )
            _write(path / RECORD, record)
        except BaseException:
            lock.release()
            raise
        made = cls(path, record, lock)
        made._is_new = True
        return made

    @classmethod
    def reopen(cls, path: Path, kind: str, identity: Mapping[str, Any]) -> RunFolder:
        """Locks the folder of a run that is resumed.

        Args:
            path: Path of the folder.
            kind: "train" or "eval". It is used if the folder has no run.json.
            identity: Identity of the run. It is used if the folder has no run.json.

        Raises:
            FolderInUseError: if another process has locked the folder.
        """
        record = read_record(path) or _new_record(kind, identity)
        if not is_rank_zero():
            return cls(path, record, None)
        lock = FolderLock(path)
        record.setdefault("resumed", []).append(_start())
        _write(path / RECORD, record)
        return cls(path, record, lock)

    def save_options(self, options: Mapping[str, Any]) -> None:
        """Writes all options to `config.yaml`, with interpolations resolved.

        A file with other options is first renamed to `config_<number>.yaml`.

        Args:
            options: Options as plain nested values.
        """
        from omegaconf import OmegaConf

        path = self.path / "config.yaml"
        text = OmegaConf.to_yaml(OmegaConf.create(dict(options)))
        if path.exists() and path.read_text(errors="replace") != text:
            count = len([*self.path.glob("config_*.yaml")])
            os.replace(path, self.path / f"config_{count}.yaml")
        path.write_text(text)

    def note(self, key: str, value: Any) -> None:
        """Adds an entry to `run.json`.

        Args:
            key: Name of the entry.
            value: Value that JSON can store.
        """
        self.record[key] = value
        if is_rank_zero():
            _write(self.path / RECORD, self.record)

    def hold(self, folder: Path) -> None:
        """Locks another folder that the run writes to, if it is outside of the run's folder.

        Raises:
            FolderInUseError: if another run has locked the folder.
        """
        if is_rank_zero() and self.path.resolve() not in folder.resolve().parents:
            folder.mkdir(parents=True, exist_ok=True)
            self._locks.append(FolderLock(folder))

    def close(self) -> None:
        """Releases the lock of the run's folder, and those of `hold`."""
        for lock in self._locks:
            lock.release()
        self._locks = []

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None and self._is_new and not any(self.path.glob(CHECKPOINTS)):
            self._leave()
        self.close()

    def _leave(self) -> None:
        """Makes the folder usable for a new run, after a failure without a checkpoint.

        It deletes `run.json` and renames `metrics.csv`.
        """
        with suppress(OSError):
            (self.path / RECORD).unlink(missing_ok=True)
            if (self.path / "metrics.csv").exists():
                os.replace(self.path / "metrics.csv", self.path / f"metrics_{self.id}_failed.csv")


def read_record(folder: Path) -> dict[str, Any] | None:
    """Returns the contents of `run.json` in a folder; None if it cannot be read or is damaged."""
    try:
        record = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(record, dict) or "id" not in record:
        return None
    return record if isinstance(record.get("resumed", []), list) else None


def remove_orphans(runs_dir: Path) -> None:
    """Deletes half-written checkpoints that killed runs left.

    Runs that are still active keep their files.

    Args:
        runs_dir: Folder of all runs with a name. Runs of a multirun lie one folder deeper.
    """
    if not is_rank_zero():
        return
    for checkpoints in [*runs_dir.glob("*/checkpoints"), *runs_dir.glob("*/*/checkpoints")]:
        if _unfinished(checkpoints) and not is_locked(checkpoints.parent):
            remove_unfinished(checkpoints)


def remove_unfinished(checkpoints: Path) -> None:
    """Deletes half-written checkpoints in a directory, and logs a line for each.

    Args:
        checkpoints: Directory of checkpoints, to which no active run writes.
    """
    for orphan in _unfinished(checkpoints):
        try:
            remove(orphan)
        except OSError as error:
            log.warning("Could not delete %s: %s", orphan, error.strerror)
        else:
            log.info("Deleted %s, which a killed run left.", orphan)


def _unfinished(checkpoints: Path) -> list[Path]:
    return [path for pattern in ORPHANS for path in checkpoints.glob(pattern)]


def _new_record(kind: str, identity: Mapping[str, Any]) -> dict[str, Any]:
    return {"id": secrets.token_hex(4), "kind": kind, **_start(), "identity": dict(identity)}


def _start() -> dict[str, Any]:
    """Returns the start of this process: time, arguments, host, process id and SLURM job."""
    return {
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "arguments": sys.argv[1:],
        "host": socket.gethostname(),
        "process": os.getpid(),
        "slurm_job": slurm_job(),
    }


def _write(path: Path, record: Mapping[str, Any]) -> None:
    """Writes a JSON file atomically."""
    temporary = path.with_suffix(".tmp")
    from lctrain_kernels.strict_json import write_json  # imports torch: not for --help

    write_json(temporary, record)
    os.replace(temporary, path)
