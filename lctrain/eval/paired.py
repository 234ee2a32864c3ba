"""compare_runs: paired differences between evaluations of the same items, with their errors."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lctrain.eval.cells import Cell, CellStore
from lctrain.eval.files import write_table
from lctrain.eval.interval import bootstrap_interval
from lctrain.eval.ratio import token_mean
from lctrain.eval.records import Item, Measure
from lctrain.pluralize import pluralize
from lctrain.warn import warn_once

STEM = "comparison"
# Settings of a task that choose among its items. Paths of files may differ between machines.
CHOOSE_ITEMS = (
    *("lengths", "methods", "tasks", "items", "needles", "keys_per_cell", "depths", "limit"),
    *("batch_size", "questions", "include_path"),
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PairedRow:
    """The difference of one measure between two runs.

    Attributes:
        task: Name of the task.
        runs: Names of the two runs.
        methods: Methods of the two runs; empty for the model as it is.
        length: Context length in tokens.
        columns: Further columns of the items.
        measure: The measure.
        means: Mean of each run, over the items that both have.
        difference: The second mean minus the first.
        stderr: Standard error of the difference over items.
        low: Lower end of the 95 % interval of the difference; NaN from too few items.
        high: Upper end of the interval.
        items: Number of items that both runs have.
    """

    task: str
    runs: tuple[str, str]
    methods: tuple[str, str]
    length: int
    columns: Mapping[str, Any]
    measure: Measure
    means: tuple[float, float]
    difference: float
    stderr: float
    low: float
    high: float
    items: int

    @property
    def better(self) -> str:
        """Name of the run that is better, if the interval does not hold 0; else empty."""
        if not (self.low > 0 or self.high < 0):
            return ""
        return self.runs[int((self.difference > 0) == self.measure.larger_is_better)]

    @property
    def interval(self) -> str:
        """The interval as text; the number of items if these are too few for an interval."""
        if math.isnan(self.low):
            return f"[no interval from {pluralize(self.items, 'item')}]"
        return f"[{self.low:+.4f}, {self.high:+.4f}]"

    def as_dict(self) -> dict[str, Any]:
        """Returns the row for files."""
        return {
            "task": self.task,
            "measure": self.measure.name,
            "length": self.length,
            "columns": ", ".join(f"{key} {value}" for key, value in self.columns.items()),
            "first": self.runs[0],
            "first_method": self.methods[0],
            "first_mean": self.means[0],
            "second": self.runs[1],
            "second_method": self.methods[1],
            "second_mean": self.means[1],
            "difference": self.difference,
            "stderr": self.stderr,
            "low": self.low,
            "high": self.high,
            "items": self.items,
            "better": self.better,
        }


@dataclass(frozen=True)
class RunComparison:
    """Paired differences between runs; `str()` of it is a table in text.

    Attributes:
        rows: Rows by task, method, length, columns and measure.
    """

    rows: tuple[PairedRow, ...]

    def save(self, output_dir: str | Path) -> dict[str, Path]:
        """Writes comparison.csv and comparison.json; returns the paths by "csv" and "json"."""
        return write_table(output_dir, STEM, [row.as_dict() for row in self.rows], {})

    def __str__(self) -> str:
        lines = ["Paired differences, second minus first, with 95 % intervals over items"]
        for row in self.rows:
            label = " ".join(map(str, row.columns.values()))
            head = f"{row.task} {label}".strip()
            methods = " -> ".join(dict.fromkeys(filter(None, row.methods)))
            names = f"{row.runs[0]} {row.means[0]:.4f}, {row.runs[1]} {row.means[1]:.4f}"
            lines.append(
                f"{head:<26}{methods:<14}{row.length:>9,}  {row.measure.name:<8} {names}: "
                f"{row.difference:+.4f} {row.interval}"
                + (f"  {row.better} is better" if row.better else "")
            )
        return "\n".join(lines)


def compare_runs(folders: Sequence[str | Path]) -> RunComparison:
    """Compares the first evaluation with each other one, item by item.

    Runs are compared method by method. If each has one method, these two are compared.

    Args:
        folders: Folders of lctrain-eval, at least two.

    Raises:
        ValueError: if there are fewer than two folders, one is no evaluation, two runs have no
            item in common, or a task has other settings, such as a seed, and so other items.
    """
    if len(folders) < 2:
        raise ValueError(
            f"compare must name at least two folders of lctrain-eval, got {list(folders)}. Give "
            "another one."
        )
    paths = [Path(folder).expanduser() for folder in folders]
    stores = [CellStore.read(path, "compare") for path in paths]
    names = _names(paths)
    rows: list[PairedRow] = []
    for number in range(1, len(stores)):
        pair = (stores[0], stores[number])
        _require_same_items(pair, (paths[0], paths[number]))
        found = list(_compare(pair, (names[0], names[number])))
        if not found:
            raise ValueError(
                f"compare must name runs with items in common, got {paths[0]} and {paths[number]}. "
                "Evaluate both with the same tasks, methods, lengths, data and seeds."
            )
        rows += found
    return RunComparison(tuple(rows))


def _require_same_items(stores: tuple[CellStore, CellStore], paths: tuple[Path, Path]) -> None:
    """Raises ValueError if a task of both runs has settings that give its items other contents."""
    first, second = (store.identity for store in stores)
    for key in first.keys() & second.keys():
        task, _, name = key.partition(".")
        together = all(task in store.tasks for store in stores)
        if together and name and name not in CHOOSE_ITEMS and first[key] != second[key]:
            raise ValueError(
                f"compare must name runs of the same items, got {paths[0]} with "
                f"{key}={first[key]!r} and {paths[1]} with {second[key]!r}. Evaluate both with the "
                "same settings."
            )
    texts = "hash of the documents"
    if first.get(texts) != second.get(texts):
        warn_once(
            log,
            "The documents of %s and %s have other texts or other tokens. Their items are paired "
            "by name, so compare losses only if you know the texts to be the same.",
            *paths,
        )


def _names(paths: Sequence[Path]) -> list[str]:
    """Returns the last part of each path; more of it, where these are the same."""
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{path} ({number})" for number, path in enumerate(paths, 1)]


def _compare(stores: tuple[CellStore, CellStore], names: tuple[str, str]) -> list[PairedRow]:
    first, second = stores
    rows = []
    for task in [name for name in first.tasks if name in second.tasks]:
        methods = [list(dict.fromkeys(c.method for c in s if c.task == task)) for s in stores]
        single = all(len(found) == 1 for found in methods)
        pairs = (
            [(methods[0][0], methods[1][0])]
            if single
            else [(method, method) for method in methods[0] if method in methods[1]]
        )
        for pair in pairs:
            lengths = sorted(
                {c.length for c in first if (c.task, c.method) == (task, pair[0])}
                & {c.length for c in second if (c.task, c.method) == (task, pair[1])}
            )
            for length in lengths:
                items = (
                    first[Cell(task, pair[0], length)].items,
                    second[Cell(task, pair[1], length)].items,
                )
                for measure in first.tasks[task].measures:
                    rows += _rows(task, names, pair, length, measure, items)
    return rows


def _rows(
    task: str,
    names: tuple[str, str],
    methods: tuple[str, str],
    length: int,
    measure: Measure,
    items: tuple[Sequence[Item], Sequence[Item]],
) -> list[PairedRow]:
    """Returns a row for each group of items with the same columns."""
    other = {item.id: item for item in items[1]}
    groups: dict[tuple[tuple[str, Any], ...], list[tuple[Item, Item]]] = {}
    for item in items[0]:
        if item.id in other:
            groups.setdefault(tuple(item.columns.items()), []).append((item, other[item.id]))
    rows = []
    for columns, pairs in groups.items():
        sums = np.array([[one.totals[measure.name] for one in pair] for pair in pairs])
        weights = np.array([[one.weight for one in pair] for pair in pairs])
        if (weights[:, 0] != weights[:, 1]).any():  # other tokens: each item counts once
            sums, weights = sums / weights, np.ones_like(weights)
        differences = sums[:, 1] - sums[:, 0]
        difference, stderr = token_mean(differences, weights[:, 0])
        low, high = bootstrap_interval(differences, weights[:, 0])
        totals = sums.sum(axis=0) / weights.sum(axis=0)
        rows.append(
            PairedRow(
                task,
                names,
                methods,
                length,
                dict(columns),
                measure,
                (float(totals[0]), float(totals[1])),
                difference,
                stderr,
                low,
                high,
                len(pairs),
            )
        )
    return rows
