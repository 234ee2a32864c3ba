"""CellStore: finished cells of an evaluation in a file, from which a killed one goes on."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Iterator, Mapping, MutableMapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lctrain.eval.records import Item, Measure, Result
from lctrain.eval.task import Task
from lctrain_kernels.strict_json import number, to_json

CELLS = "cells.jsonl"


@dataclass(frozen=True)
class Cell:
    """What is computed at once: a task, read with one method, at one length.

    Attributes:
        task: Name of the task.
        method: Name of the method; empty for the model as it is.
        length: Context length in tokens.
    """

    task: str
    method: str
    length: int


@dataclass(frozen=True)
class TaskRecord:
    """What is stored of a task, so that runs can be compared without it.

    Attributes:
        title: Name for pictures.
        unit: Name of an item.
        measures: What the totals of every item hold.
    """

    title: str
    unit: str
    measures: tuple[Measure, ...]


class CellStore(MutableMapping[Cell, Result]):
    """Results by cell, which are written to a file as they are added.

    Each line of the file is a JSON object: first the identity of the evaluation, then tasks and
    cells. A kill can damage the last line only, which is then left out. A number that is not finite
    is null in the file, and NaN when it is read.

    Attributes:
        identity: Settings on which the results depend.
        tasks: Stored tasks by name.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Stores the attributes; callers use `create`, `reopen` or `read`."""
        self.identity = dict(identity)
        self.tasks: dict[str, TaskRecord] = {}
        self._path = path
        self._results: dict[Cell, Result] = {}

    @classmethod
    def create(cls, folder: Path, identity: Mapping[str, Any]) -> CellStore:
        """Begins the file in a folder; one that is there is replaced."""
        store = cls(folder / CELLS, _plain(identity))
        store._path.unlink(missing_ok=True)
        store._append({"identity": store.identity})
        return store

    @staticmethod
    def has_cells(folder: Path) -> bool:
        """Returns whether a folder has a file with at least one finished cell."""
        path = folder / CELLS
        return path.is_file() and any("items" in line for line in _objects(path))

    @classmethod
    def read(cls, folder: Path, name: str) -> CellStore:
        """Reads the file of a folder.

        Args:
            folder: Folder of an evaluation.
            name: Name of the setting that named the folder, for messages.

        Raises:
            ValueError: if the folder has no such file, or it is damaged or of another version.
        """
        path = folder / CELLS
        if not path.is_file():
            raise ValueError(
                f"{name} must be a folder of lctrain-eval, got {folder}, which has no {CELLS}. "
                "Check the path."
            )
        lines = list(_objects(path))
        if not lines or "identity" not in lines[0]:
            raise ValueError(
                f"{name} must be a folder of lctrain-eval, got {folder}, whose {CELLS} is damaged. "
                "Evaluate again."
            )
        store = cls(path, lines[0]["identity"])
        for line in lines[1:]:
            try:
                store._take(line)
            except (KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{name} must be a folder of this version's lctrain-eval, got {folder}, whose "
                    f"{CELLS} has a line without the expected fields. Evaluate again."
                ) from error
        return store

    @classmethod
    def reopen(
        cls, folder: Path, identity: Mapping[str, Any], may_change: Collection[str] = ()
    ) -> CellStore:
        """Reads the file of a folder, to add the cells that are missing.

        Args:
            folder: Folder of an evaluation.
            identity: Settings of this evaluation.
            may_change: Tasks whose own settings may differ while none of their cells is finished.

        Raises:
            ValueError: if the stored settings are others.
        """
        store = cls.read(folder, "resume")
        store.require_same(identity, may_change)
        store.identity = _plain(identity)
        lines = [{"identity": store.identity}, *map(_task_line, store.tasks.items())]
        lines += [_cell_line(cell, result) for cell, result in store.items()]
        temporary = store._path.with_suffix(".tmp")  # without the line that a kill cut off
        temporary.write_text("".join(to_json(line) + "\n" for line in lines))
        os.replace(temporary, store._path)
        return store

    def require_same(
        self,
        identity: Mapping[str, Any],
        may_change: Collection[str] = (),
        unknown: Collection[str] = (),
    ) -> None:
        """Checks that the stored settings are those of another evaluation.

        Args:
            identity: Settings of the other evaluation.
            may_change: Tasks whose own settings may differ while none of their cells is finished.
            unknown: Names of settings that `identity` does not have yet.

        Raises:
            ValueError: if a setting differs.
        """
        begun = {cell.task for cell in self}
        expected = _plain(identity)
        for key in sorted({*expected, *self.identity} - {*unknown}):
            task = key.partition(".")[0]
            theirs, ours = self.identity.get(key), expected.get(key)
            if theirs != ours and (task not in may_change or task in begun):
                raise ValueError(
                    "resume must name an evaluation with the same settings, got "
                    f"{self._path.parent} with {key}={theirs!r} instead of {ours!r}. Restore it, "
                    "or start a new one."
                )

    def describe(self, task: Task) -> None:
        """Stores what is known of a task."""
        if task.name not in self.tasks:
            self.tasks[task.name] = TaskRecord(task.title, task.unit, task.item_measures)
            self._append(_task_line((task.name, self.tasks[task.name])))

    def __getitem__(self, cell: Cell) -> Result:
        return self._results[cell]

    def __setitem__(self, cell: Cell, result: Result) -> None:
        self._results[cell] = result
        self._append(_cell_line(cell, result))

    def __delitem__(self, cell: Cell) -> None:
        raise TypeError("a finished cell stays in its file")

    def __iter__(self) -> Iterator[Cell]:
        return iter(self._results)

    def __len__(self) -> int:
        return len(self._results)

    def _append(self, line: Mapping[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(to_json(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _take(self, line: Mapping[str, Any]) -> None:
        if "measures" in line:
            measures = tuple(Measure(**measure) for measure in line["measures"])
            self.tasks[line["task"]] = TaskRecord(line["title"], line["unit"], measures)
        else:
            items = tuple(Item(**item | _numbers(item)) for item in line["items"])
            cell = Cell(line["task"], line["method"], line["length"])
            facts = {name: math.nan if v is None else v for name, v in line["facts"].items()}
            self._results[cell] = Result(items, facts)


def _numbers(item: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the totals of a stored item, NaN where the file holds null."""
    return {"totals": {name: number(total) for name, total in item["totals"].items()}}


def _plain(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings as JSON stores them."""
    return dict(json.loads(to_json(identity, default=str)))


def _objects(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the objects of all lines up to the first one that is damaged."""
    for line in path.read_text().splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            return
        if not isinstance(found, dict):
            return
        yield found


def _task_line(entry: tuple[str, TaskRecord]) -> dict[str, Any]:
    name, record = entry
    measures = [asdict(measure) for measure in record.measures]
    return {"task": name, "title": record.title, "unit": record.unit, "measures": measures}


def _cell_line(cell: Cell, result: Result) -> dict[str, Any]:
    items = [asdict(item) for item in result.items]
    return {**asdict(cell), "facts": dict(result.facts), "items": items}
