"""MethodComparison: perplexity by context length, for each method of reading beyond the window."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lctrain.eval.comparison_plot import plot_comparison
from lctrain.eval.files import write_rows
from lctrain.eval.row import PerplexityRow
from lctrain.eval.table import PerplexityTable
from lctrain.pluralize import pluralize


@dataclass(frozen=True)
class MethodComparison:
    """Perplexity of the same tokens, by method and context length.

    Attributes:
        tables: Table of each method, with a row per context length.
        window: Length of the texts that the model was trained on, in tokens.
        name: Name of the model; may be empty.
        stem: Name of the files without their suffix.
    """

    stem: ClassVar[str] = "perplexity_by_method"

    tables: Mapping[str, PerplexityTable]
    window: int
    name: str = ""

    def ratio(self, method: str, row: PerplexityRow) -> float:
        """Returns a perplexity divided by the method's perplexity at the trained window.

        The divisor is the perplexity at the longest length within the window; NaN if there is none.

        Args:
            method: Name of the method.
            row: Row of the method's table.
        """
        within = [r for r in self.tables[method].rows if r.length <= self.window]
        return row.perplexity / within[-1].perplexity if within else math.nan

    def as_dicts(self) -> list[dict[str, Any]]:
        """Returns a dictionary per method and length: method, PerplexityRow and `ratio`."""
        return [
            {
                "method": method,
                **dataclasses.asdict(row),
                "ratio_to_window": self.ratio(method, row),
            }
            for method, table in self.tables.items()
            for row in table.rows
        ]

    def metrics(self) -> dict[str, float]:
        """Returns the perplexities by method and length, for loggers."""
        return {
            f"perplexity_{method}_{row.length}": row.perplexity
            for method, table in self.tables.items()
            for row in table.rows
        }

    def save(self, output_dir: str | Path) -> dict[str, Path]:
        """Writes perplexity_by_method.csv, .json and .png; see PerplexityTable.save.

        Returns:
            The paths by "csv", "json" and "png".
        """
        table = next(iter(self.tables.values()))
        settings = {
            "name": self.name,
            "window": self.window,
            "stride": table.stride,
            "min_context": table.min_context,
            "begin_tokens": list(table.begin_tokens),
        }
        paths = write_rows(output_dir, self.stem, self.as_dicts(), settings)
        plot_comparison(self.tables, self.window, self.name, paths["png"])
        return paths

    def __str__(self) -> str:
        first = next(iter(self.tables.values()))
        head = first.rows[0]
        widths = {method: max(20, len(method) + 2) for method in self.tables}
        lines = [
            f"Perplexity by context length and method{f' of {self.name}' if self.name else ''}: "
            f"{pluralize(head.tokens, 'token')} of {pluralize(head.documents, 'document')}, the "
            "same in "
            f"every cell; window {self.window:,}",
            f"{'length':>10}" + "".join(f"{m:>{width}}" for m, width in widths.items()),
        ]
        for index, row in enumerate(first.rows):
            cells = [
                f"{self._cell(method, table.rows[index]):>{widths[method]}}"
                for method, table in self.tables.items()
            ]
            lines.append(f"{row.length:>10,}" + "".join(cells))
        brackets = "in brackets: over the same method's perplexity at the window; "
        has_window = first.rows[0].length <= self.window
        errors = "standard errors over documents are in the files"
        lines.append(f"{brackets if has_window else ''}{errors}")
        if first.begun:
            lines.append(first.begun)
        return "\n".join(lines)

    def _cell(self, method: str, row: PerplexityRow) -> str:
        ratio = self.ratio(method, row)
        text = f"{row.perplexity:,.2f}" if row.perplexity < 1e6 else f"{row.perplexity:.1e}"
        if math.isnan(ratio):
            return text
        return f"{text} ({ratio:.3f})" if ratio < 1e4 else f"{text} ({ratio:.0e})"
