"""MeasureRows: means of a task's measures, by method, length and the task's columns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lctrain.eval.interval import bootstrap_interval, share_interval
from lctrain.eval.ratio import token_mean
from lctrain.eval.records import Item, Measure, Result

Columns = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Estimate:
    """The mean of one measure.

    Attributes:
        mean: Sum of the measure over all units, divided by the number of units.
        stderr: Standard error of the mean over items; NaN for a single item.
        low: Lower end of the 95 % interval; NaN where it is not known.
        high: Upper end of the 95 % interval.
    """

    mean: float
    stderr: float
    low: float
    high: float

    @classmethod
    def of(cls, measure: Measure, items: Sequence[Item]) -> Estimate:
        """Returns the mean of a measure over items, with its errors."""
        sums = np.array([item.totals[measure.name] for item in items])
        weights = np.array([item.weight for item in items])
        mean, stderr = token_mean(sums, weights)
        if measure.is_share:
            return cls(mean, stderr, *share_interval(mean, len(items)))
        return cls(mean, stderr, *bootstrap_interval(sums, weights))


@dataclass(frozen=True)
class MeasureRow:
    """The measures of items with the same columns, of one method at one length.

    Attributes:
        method: Name of the method; empty for the model as it is.
        length: Context length in tokens.
        columns: Pairs (name, value) of the further columns.
        items: Number of items.
        estimates: Estimate of each measure, by name of the measure.
        facts: Further numbers of the cell.
    """

    method: str
    length: int
    columns: Columns
    items: int
    estimates: Mapping[str, Estimate]
    facts: Mapping[str, float] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Values of the columns as text; empty without columns."""
        return ", ".join(str(value) for _, value in self.columns)


@dataclass(frozen=True, eq=False)
class MeasureRows:
    """The rows of a task's table.

    Attributes:
        stem: Name of the task, and of the files without their suffix.
        title: Name of the task for pictures.
        unit: Name of an item.
        measures: What was measured, the most important measure first.
        rows: Rows by method, length and columns.
        name: Name of the model; may be empty.
        window: Length of the texts that the model was trained on, in tokens; None if unknown.
    """

    stem: str
    title: str
    unit: str
    measures: tuple[Measure, ...]
    rows: tuple[MeasureRow, ...]
    name: str = ""
    window: int | None = None

    @property
    def methods(self) -> list[str]:
        """Names of the methods."""
        return list(dict.fromkeys(row.method for row in self.rows))

    @property
    def lengths(self) -> list[int]:
        """Context lengths, rising."""
        return sorted({row.length for row in self.rows})

    @property
    def groups(self) -> list[Columns]:
        """Distinct values of the further columns, in order of the rows."""
        return list(dict.fromkeys(row.columns for row in self.rows))

    def means(self, measure: Measure, method: str) -> np.ndarray:
        """Returns the means of a measure, [lengths, groups] float64; NaN where there is no row."""
        cells = {(r.length, r.columns): r for r in self.rows if r.method == method}
        return np.array(
            [
                [
                    cells[length, group].estimates[measure.name].mean
                    if (length, group) in cells
                    else math.nan
                    for group in self.groups
                ]
                for length in self.lengths
            ]
        )

    def effective_length(self, measure: Measure, method: str, group: Columns | None) -> int | None:
        """Returns the longest length up to which the means of all lengths reach the threshold.

        Args:
            measure: Measure with a threshold.
            method: Name of the method.
            group: Values of the further columns; None for the mean over all groups.

        Returns:
            The length in tokens; 0 if the shortest length does not reach the threshold, and None if
            the measure has no threshold.
        """
        if measure.threshold is None:
            return None
        means = self.means(measure, method)
        column = means.mean(axis=1) if group is None else means[:, self.groups.index(group)]
        longest = 0
        for length, mean in zip(self.lengths, column.tolist(), strict=True):
            if not measure.reaches(mean):
                break
            longest = length
        return longest


def rows_of(
    measures: Sequence[Measure], results: Mapping[str, Mapping[int, Result]]
) -> tuple[MeasureRow, ...]:
    """Returns a row per method, length and distinct columns of the items.

    Args:
        measures: What was measured.
        results: Results by method and length.
    """
    rows = []
    for method, by_length in results.items():
        for length, result in by_length.items():
            groups: dict[Columns, list[Item]] = {}
            for item in result.items:
                groups.setdefault(tuple(item.columns.items()), []).append(item)
            for columns, items in groups.items():
                estimates = {m.name: Estimate.of(m, items) for m in measures}
                rows.append(
                    MeasureRow(method, length, columns, len(items), estimates, result.facts)
                )
    return tuple(rows)
