"""The folder of a run: created for one run, locked while it runs, reopened only to resume it."""

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
from lctrain.run.slurm import slurm_job

log = logging.getLogger(__name__)

RECORD = "run.json"
CHECKPOINTS = "checkpoints/step-*.ckpt"
TRACES = (RECORD, "metrics.csv", CHECKPOINTS)
ORPHANS = ("step-*.ckpt.tmp", "step-*.ckpt.writing", "step-*.ckpt.tmp.writing", "last.link")


class RunFolder:
    """The folder of one run, locked until `close`. `run.json` in it has the id of the run.

    Ranks other than the first lock nothing.

    Attributes:
        path: The folder.
        record: Contents of `run.json`: `id`, `kind`, `identity` and how the run was started.
    """

    def __init__(self, path: Path, record: dict[str, Any], lock: FolderLock | None) -> None:
        """Use `create` or `reopen`."""
        self.path = path
        self.record = record
        self._locks = [] if lock is None else [lock]
        self._is_new = False

    @property
    def id(self) -> str:
        """Id of the run, also in Weights and Biases."""
        return str(self.record["id"])

    @classmethod
    def create(cls, path: Path, kind: str, identity: Mapping[str, Any]) -> RunFolder:
        """Creates the folder of a new run, or uses an existing folder without a run.

        Args:
            path: The folder.
            kind: train or eval.
            identity: Options that make the run what it is: see `identity_of`.

        Raises:
            ValueError: if the folder has a run.
            FolderInUseError: if another process is creating a run in it.
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
        """Opens the folder of a run that is resumed.

        Args:
            path: The folder.
            kind: train or eval.
            identity: Used if the folder has no record.

        Raises:
            FolderInUseError: if the run is running.
        """
        record = read_record(path) or _new_record(kind, identity)
        if not is_rank_zero():
            return cls(path, record, None)
        lock = FolderLock(path)
        record.setdefault("resumed", []).append(_start())
        _write(path / RECORD, record)
        return cls(path, record, lock)

    def save_options(self, options: Mapping[str, Any]) -> None:
        """Writes the resolved options to `config.yaml`; what it said before a resume is kept.

        Args:
            options: Plain nested values.
        """
        from omegaconf import OmegaConf

        path = self.path / "config.yaml"
        text = OmegaConf.to_yaml(OmegaConf.create(dict(options)))
        if path.exists() and path.read_text() != text:
            count = len([*self.path.glob("config_*.yaml")])
            os.replace(path, self.path / f"config_{count}.yaml")
        path.write_text(text)

    def note(self, key: str, value: Any) -> None:
        """Adds entries to `run.json` that a resumed run needs.

        Args:
            key: Its name in the record.
            value: A plain value of JSON.
        """
        self.record[key] = value
        if is_rank_zero():
            _write(self.path / RECORD, self.record)

    def hold(self, folder: Path) -> None:
        """Locks another folder that the run writes into.

        Raises:
            FolderInUseError: if another run uses it.
        """
        if is_rank_zero() and self.path.resolve() not in folder.resolve().parents:
            folder.mkdir(parents=True, exist_ok=True)
            self._locks.append(FolderLock(folder))

    def close(self) -> None:
        """Unlocks the folder for other runs."""
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
        """Unlocks the folder for the next attempt, since there is no checkpoint to resume from."""
        with suppress(OSError):
            (self.path / RECORD).unlink(missing_ok=True)
            if (self.path / "metrics.csv").exists():
                os.replace(self.path / "metrics.csv", self.path / f"metrics_{self.id}_failed.csv")


def read_record(folder: Path) -> dict[str, Any] | None:
    """Returns the contents of `run.json` in a folder; None if there is none that can be read."""
    try:
        record = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and "id" in record else None


def remove_orphans(runs_dir: Path) -> None:
    """Deletes half-written checkpoints of runs that were killed, in all runs of this name.

    Args:
        runs_dir: Folder of the runs of a name; those of a multirun are one folder deeper.
    """
    if not is_rank_zero():
        return
    for checkpoints in [*runs_dir.glob("*/checkpoints"), *runs_dir.glob("*/*/checkpoints")]:
        orphans = [file for pattern in ORPHANS for file in checkpoints.glob(pattern)]
        if not orphans or is_locked(checkpoints.parent):
            continue
        for orphan in orphans:
            try:
                orphan.unlink(missing_ok=True)
            except OSError as error:
                log.warning("Could not delete %s: %s", orphan, error.strerror)
            else:
                log.info("Deleted %s, which a killed run left.", orphan)


def _new_record(kind: str, identity: Mapping[str, Any]) -> dict[str, Any]:
    return {"id": secrets.token_hex(4), "kind": kind, **_start(), "identity": dict(identity)}


def _start() -> dict[str, Any]:
    """Returns how and where this process was started."""
    return {
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "arguments": sys.argv[1:],
        "host": socket.gethostname(),
        "process": os.getpid(),
        "slurm_job": slurm_job(),
    }


def _write(path: Path, record: Mapping[str, Any]) -> None:
    """Writes JSON at once."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=2) + "\n")
    os.replace(temporary, path)
