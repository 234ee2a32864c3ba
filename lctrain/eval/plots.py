"""Plots of evaluation results, drawn without a display."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lctrain.eval.table import PerplexityTable

INK = "#1f2933"
MUTED = "#616e7c"
LINE = "#0b6e99"


def plot_perplexity(table: PerplexityTable, path: Path) -> None:
    """Draws perplexity against context length, with a band of one standard error over documents.

    Args:
        table: at least one row; rows whose perplexity is not finite leave a gap.
        path: PNG file to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(7.2, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    lengths = [row.length for row in table.rows]
    axes.fill_between(
        lengths,
        [row.perplexity_low for row in table.rows],
        [row.perplexity_high for row in table.rows],
        color=LINE,
        alpha=0.18,
        linewidth=0,
        label="± one standard error over documents",
    )
    axes.plot(lengths, [row.perplexity for row in table.rows], color=LINE, marker="o", linewidth=2)
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    if len(lengths) > 8:
        axes.tick_params(axis="x", labelrotation=45)
    axes.margins(x=0.06, y=0.18)
    axes.set_xlabel("Context length (tokens, at most)", color=INK)
    axes.set_ylabel("Perplexity", color=INK)
    for row in table.rows:
        if math.isfinite(row.perplexity):
            axes.annotate(
                f"{row.perplexity:,.4g}",
                (row.length, row.perplexity),
                xytext=(0, 9),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=INK,
            )
    title = "Perplexity by context length" + (f": {table.name}" if table.name else "")
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK, pad=22)
    row = table.rows[0]
    axes.text(
        0,
        1.03,
        f"{row.tokens:,} held-out tokens of {row.documents:,} documents, the same at every length",
        transform=axes.transAxes,
        fontsize=9,
        color=MUTED,
    )
    axes.grid(axis="y", color="#e4e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=MUTED)
    if row.documents > 1:
        axes.legend(frameon=False, fontsize=8, labelcolor=MUTED)
    figure.savefig(path)
