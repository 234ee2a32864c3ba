"""MeasureTable: the result of any task, as text and as files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lctrain.eval.files import write_rows
from lctrain.eval.measure_plot import plot_measure
from lctrain.eval.measure_rows import Columns, MeasureRows, rows_of
from lctrain.eval.records import Measure, Result, Subject
from lctrain.pluralize import pluralize


class MeasureTable(MeasureRows):
    """The result of a task, as text and as files."""

    @classmethod
    def of(
        cls,
        stem: str,
        title: str,
        unit: str,
        measures: tuple[Measure, ...],
        results: Mapping[str, Mapping[int, Result]],
        subject: Subject,
    ) -> MeasureTable:
        """Builds the table of a task.

        Args:
            stem: Name of the task.
            title: Name of the task for pictures.
            unit: Name of an item.
            measures: What was measured.
            results: Results by method and length.
            subject: Model, tokenizer and documents.
        """
        rows = rows_of(measures, results)
        return cls(stem, title, unit, measures, rows, subject.name, subject.window)

    def as_dicts(self) -> list[dict[str, Any]]:
        """Returns a dictionary per row: method, length, columns, items, measures and facts."""
        found = []
        for row in self.rows:
            values: dict[str, Any] = {"method": row.method, "length": row.length}
            values |= dict(row.columns) | {"items": row.items}
            for name, estimate in row.estimates.items():
                values |= {
                    name: estimate.mean,
                    f"{name}_stderr": estimate.stderr,
                    f"{name}_low": estimate.low,
                    f"{name}_high": estimate.high,
                }
            for measure in self.measures:
                if measure.exponential:
                    e, name = row.estimates[measure.name], measure.exponential
                    ends = np.exp([e.mean, e.low, e.high]).tolist()
                    values |= {name: ends[0], f"{name}_low": ends[1], f"{name}_high": ends[2]}
            found.append(values | dict(row.facts))
        keys = dict.fromkeys(key for values in found for key in values)
        return [{key: values.get(key) for key in keys} for values in found]

    def metrics(self) -> dict[str, float]:
        """Returns the means of the first measure by method, length and columns, for loggers."""
        found = {}
        for row in self.rows:
            values = [str(value) for _, value in row.columns]
            parts = [self.stem, row.method, *values, str(row.length)]
            name = "_".join(filter(None, parts)).replace(" ", "_")
            found[name] = row.estimates[self.measures[0].name].mean
        return found

    def save(self, output_dir: str | Path) -> dict[str, Path]:
        """Writes <stem>.csv, .json and .png.

        Returns:
            The paths by "csv", "json" and "png".
        """
        settings: dict[str, Any] = {"name": self.name, "window": self.window}
        effective = self._effective()
        if effective:
            settings["effective_length"] = effective
        paths = write_rows(output_dir, self.stem, self.as_dicts(), settings)
        plot_measure(self, self.measures[0], paths["png"])
        return paths

    def _effective(self) -> list[dict[str, Any]]:
        """Returns the effective lengths by measure, method and group."""
        return [
            {
                "measure": measure.name,
                "threshold": measure.threshold,
                "method": method,
                **dict(group or ()),
                "tokens": self.effective_length(measure, method, group),
            }
            for measure in self.measures
            if measure.threshold is not None
            for method in self.methods
            for group in [*self.groups, None]
            if group != ()
        ]

    def __str__(self) -> str:
        lines = []
        for measure in self.measures:
            lines += self._text(measure)
        return "\n".join(lines)

    def _text(self, measure: Measure) -> list[str]:
        """Returns the lines of one measure: groups by lengths."""
        most = max(row.items for row in self.rows)
        of_model = f" of {self.name}" if self.name else ""
        lines = [
            f"{self.title}{of_model}: {measure.label}, {pluralize(most, self.unit)} in each cell"
        ]
        labels = [", ".join(str(value) for _, value in group) for group in self.groups]
        width = max(12, *(len(label) + 4 for label in [*labels, *self.methods]))
        for method in self.methods:
            head = f"{method:<{width}}" + "".join(f"{n:>11,}" for n in self.lengths)
            lines.append(head + (f"{'effective':>12}" if measure.threshold is not None else ""))
            means = self.means(measure, method)
            for column, (group, label) in enumerate(zip(self.groups, labels, strict=True)):
                lines.append(self._line(measure, method, group, label, means[:, column], width))
            if len(self.groups) > 1:
                lines.append(self._line(measure, method, None, "mean", means.mean(axis=1), width))
            elif not measure.is_share and not measure.exponential:
                lines.append(self._errors(measure, method, width))
        return lines

    def _errors(self, measure: Measure, method: str, width: int) -> str:
        """Returns the line of the standard errors, of a table without further columns."""
        errors = {
            row.length: row.estimates[measure.name].stderr
            for row in self.rows
            if row.method == method
        }
        texts = [
            f"±{measure.text(errors[length])}" if math.isfinite(errors[length]) else "-"
            for length in self.lengths
        ]
        return f"  {'error':<{width - 2}}" + "".join(f"{text:>11}" for text in texts)

    def _line(
        self,
        measure: Measure,
        method: str,
        group: Columns | None,
        label: str,
        means: np.ndarray,
        width: int,
    ) -> str:
        cells = "".join(f"{measure.text(value):>11}" for value in means.tolist())
        effective = self.effective_length(measure, method, group)
        return f"  {label:<{width - 2}}{cells}" + ("" if effective is None else f"{effective:>12,}")
