"""plot_measure: the picture of a MeasureTable, as lines by length or as heatmaps."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lctrain.eval.heatmap import plot_heatmaps
from lctrain.eval.measure_rows import MeasureRows
from lctrain.eval.method_words import method_words
from lctrain.eval.plots import INK, MUTED, new_figure, scale_lengths, style_axes
from lctrain.eval.records import Measure
from lctrain.pluralize import pluralize


def plot_measure(table: MeasureRows, measure: Measure, path: Path) -> None:
    """Draws a measure by length: heatmaps if rows have further columns, and lines otherwise.

    Args:
        table: Table with at least one row.
        measure: The measure to draw.
        path: PNG file to write.
    """
    title = table.title + (f": {table.name}" if table.name else "")
    most = max(row.items for row in table.rows)
    subtitle = f"{measure.label}; {pluralize(most, table.unit)} in each cell"
    if len(table.groups) > 1:
        if table.window is not None:
            subtitle += f"; dotted: the trained window, {table.window:,} tokens"
        names = [name for name, _ in table.groups[0]]
        plot_heatmaps(
            {method: table.means(measure, method) for method in table.methods},
            table.lengths,
            [", ".join(str(value) for _, value in group) for group in table.groups],
            path,
            title=title,
            subtitle=subtitle,
            row_label=", ".join(names).capitalize(),
            is_share=measure.is_share,
            window=table.window,
        )
        return
    figure = new_figure()
    axes = figure.add_subplot()
    for method in table.methods:
        rows = [row for row in table.rows if row.method == method]
        means = [row.estimates[measure.name] for row in rows]
        lengths = [row.length for row in rows]
        ends = np.array([[e.mean, e.low, e.high] for e in means])
        middle, low, high = (np.exp(ends) if measure.exponential else ends).T
        (line,) = axes.plot(lengths, middle, marker="o", linewidth=2, label=method_words(method))
        axes.fill_between(lengths, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    scale_lengths(axes, table.lengths)
    axes.set_xlabel("Context length (tokens)", color=INK)
    axes.set_ylabel(measure.label, color=INK)
    if table.methods != [""]:
        axes.legend(frameon=False, fontsize=8, labelcolor=MUTED)
    style_axes(axes, title, f"{subtitle}; band: 95 % interval")
    figure.savefig(path)
