"""Refuses to overwrite earlier runs, and prints a recipe's expected errors as messages."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lctrain.failure import FULL_ERROR, report_failure
from lctrain.run.folder import RECORD


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
