"""Guards the folders of earlier runs, and prints a recipe's expected errors as messages."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lctrain.failure import FULL_ERROR, report_failure
from lctrain.run.folder import RECORD
from lctrain.run.lock import FolderLock
from lctrain_kernels.strict_json import write_json

SETTINGS = "settings.json"


def refuse_earlier_runs(stage: str, folders: Iterable[Path], record: str = RECORD) -> None:
    """Raises ValueError if a stage would write into the folder of an earlier run.

    Args:
        stage: Name of the stage.
        folders: Folders into which the stage would write its runs.
        record: Name of the file that an earlier run has left there.
    """
    for folder in folders:
        if (folder / record).exists():
            raise ValueError(
                f"--output must be a folder in which the stage {stage} has not run, got {folder}, "
                f"which holds {record}. Choose another folder, delete this one, or name the other "
                "stages after --stages."
            )


def remove_stopped(folder: Path) -> None:
    """Removes the folder of a run that was stopped, if there is one.

    Raises:
        FolderInUseError: if the run still goes on.
    """
    if folder.is_dir():
        FolderLock(folder).release()
        shutil.rmtree(folder)


def require_same_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Keeps the settings of runs in their folder, in `settings.json`.

    Args:
        folder: Folder of runs, which is created.
        settings: Strings, numbers and lists of them, by name.

    Raises:
        ValueError: if the runs in the folder had other settings.
    """
    path = folder / SETTINGS
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)
        return
    earlier = json.loads(path.read_text())
    for name, value in settings.items():
        if earlier.get(name) != value:
            raise ValueError(
                f"--output must be a folder of runs with the same settings, got {folder}, whose "
                f"runs had {name}={earlier.get(name)} and not {value}. Choose another folder."
            )


@contextmanager
def messages(program: str) -> Iterator[None]:
    """Context manager that ends the process with a short message on an expected error.

    Args:
        program: Command line of the recipe, for the message.
    """
    try:
        yield
    except Exception as error:
        if os.environ.get(FULL_ERROR) == "1":
            raise
        raise SystemExit(report_failure(program, error)) from None
