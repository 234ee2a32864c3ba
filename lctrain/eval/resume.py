"""Finds the folder in which a stopped evaluation goes on, and opens the store of its cells."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lctrain.config.tasks import TASKS
from lctrain.eval.cells import CELLS, CellStore
from lctrain.eval.fingerprint import documents_hash, weights_hash
from lctrain.run.identity import identity_of

if TYPE_CHECKING:
    from lctrain.config import EvalConfig
    from lctrain.eval.records import Subject

REPORT = "report.html"
# Further tasks may be added to a stopped evaluation; the others do not change its results.
MAY_CHANGE = ("name", "resume", "compare", "tasks", "device", "max_tokens")
# Known only after the data and the model are loaded.
MEASURED = (
    "documents that were read",
    "tokens that were read",
    "hash of the documents",
    "hash of the weights",
)
MAY_CHANGE_BELOW = ("paths", "logger", "data.cache_dir", "data.num_workers", "data.num_proc")


def folder_to_resume(resume: str, runs_dir: str | Path) -> Path:
    """Returns the folder of a stopped evaluation.

    Args:
        resume: The folder, or "last" for the newest one with finished cells and without a report;
            if none has cells, the newest one.
        runs_dir: Folder of all evaluations of this name.

    Raises:
        ValueError: if there is no such evaluation.
    """
    if resume != "last":
        folder = Path(resume).expanduser()
        if not (folder / CELLS).is_file():
            raise ValueError(
                f"resume must be last or a folder of lctrain-eval, got {resume}, which has no "
                f"{CELLS}. Check the path."
            )
        return folder
    stopped = [
        file.parent
        for file in Path(runs_dir).glob(f"*/{CELLS}")
        if not (file.parent / REPORT).exists()
    ]
    if not stopped:
        raise ValueError(
            f"resume must name an evaluation, got last, and {runs_dir} holds none without a "
            "report. Name its folder, or leave resume out."
        )
    begun = [folder for folder in stopped if CellStore.has_cells(folder)]
    return max(begun or stopped, key=lambda folder: (folder / CELLS).stat().st_mtime)


def require_no_cells(folder: Path) -> None:
    """Raises ValueError if a new evaluation would replace the finished cells of a folder."""
    if CellStore.has_cells(folder):
        raise ValueError(
            f"paths.output_dir must be a folder without an evaluation, got {folder}, which holds "
            f"finished cells. Go on with it by resume={folder}, or choose another folder."
        )


def require_same_settings(config: EvalConfig) -> None:
    """Checks the settings of an evaluation that goes on, before its model is loaded.

    Raises:
        ValueError: if the stopped evaluation had other settings.
    """
    store = CellStore.read(Path(config.paths.output_dir), "resume")
    store.require_same(_settings(config), TASKS, unknown=MEASURED)


def open_cells(config: EvalConfig, subject: Subject) -> CellStore:
    """Returns the store of an evaluation's cells: a new one, or that of a stopped evaluation.

    Raises:
        ValueError: if the stopped evaluation had other settings, weights or documents.
    """
    measured = (
        len(subject.documents),
        sum(len(document.input_ids) for document in subject.documents),
        documents_hash(subject.documents),
        weights_hash(subject.model),
    )
    identity = _settings(config) | dict(zip(MEASURED, measured, strict=True))
    folder = Path(config.paths.output_dir)
    if config.resume is None:
        return CellStore.create(folder, identity)
    return CellStore.reopen(folder, identity, TASKS)


def _settings(config: EvalConfig) -> dict[str, Any]:
    """Returns the settings on which the results depend, by dotted name."""
    found: dict[str, Any] = {
        key: value
        for key, value in identity_of(config).items()
        if key not in MAY_CHANGE
        and not any(f"{key}.".startswith(f"{name}.") for name in MAY_CHANGE_BELOW)
    }
    questions = config.ruler.questions
    if questions is not None and Path(questions).expanduser().is_file():
        content = Path(questions).expanduser().read_bytes()
        found["ruler.questions_hash"] = hashlib.blake2b(content, digest_size=8).hexdigest()
    return found
