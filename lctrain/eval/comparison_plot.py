"""Plot of a MethodComparison: perplexity against context length, a line per method."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from lctrain.eval.extension import DUAL_CHUNK_METHODS
from lctrain.eval.method_words import method_words
from lctrain.eval.plots import (
    INK,
    LINEAR_SPAN,
    MUTED,
    RowsByLength,
    new_figure,
    paired_interval,
    scale_lengths,
    style_axes,
)
from lctrain.pluralize import pluralize

# Colours that colour-blind readers can tell apart (Okabe and Ito).
COLOURS = {
    "plain": "#616e7c",
    "linear": "#e69f00",
    "ntk": "#009e73",
    "yarn": "#cc79a7",
    "dual_chunk": "#0b6e99",
    "dual_chunk_yarn": "#56b4e9",
    "intra_chunk": "#d55e00",
}
MARKERS = {"plain": "s", "linear": "^", "ntk": "v", "yarn": "D", "dual_chunk": "o"}
STYLES = ("-", (0, (6, 2)), (0, (2, 1.5)))  # dashes, so that lines which coincide are visible
TALLEST = 1e6  # larger perplexities are drawn at this value, so that smaller ones stay readable


def plot_comparison(tables: Mapping[str, RowsByLength], window: int, name: str, path: Path) -> None:
    """Draws perplexity against context length, with a line per method, and marks the window.

    The band around a line is one standard error of the loss difference from the shortest length.
    Both losses are of the same tokens, so differences between documents cancel. The perplexity axis
    is logarithmic if perplexities span more than a factor of ten.

    Args:
        tables: Table of each method, at least one. A perplexity that is not finite leaves a gap.
        window: Length of the texts that the model was trained on, in tokens.
        name: Name of the model; may be empty.
        path: PNG file to write.
    """
    from matplotlib.ticker import FuncFormatter

    figure = new_figure()
    axes = figure.add_subplot()
    shown: list[float] = []
    lengths: list[int] = []
    for index, (method, table) in enumerate(tables.items()):
        lengths = [row.length for row in table.rows]
        values = [_shown(row.perplexity) for row in table.rows]
        shown += [value for value in values if not math.isnan(value)]
        colour = COLOURS.get(method, INK)
        axes.plot(
            lengths,
            values,
            label=method_words(method),
            color=colour,
            marker=MARKERS.get(method, "x"),
            linestyle=STYLES[index % len(STYLES)],
            markerfacecolor="white" if index % 2 else colour,
            linewidth=2.5 if method in DUAL_CHUNK_METHODS else 1.5,
            zorder=3 if method in DUAL_CHUNK_METHODS else 2,
        )
        low, high = paired_interval(table)
        axes.fill_between(
            lengths,
            [_shown(value) for value in low],
            [_shown(value) for value in high],
            color=colour,
            alpha=0.18,
            linewidth=0,
        )
    axes.axvline(window, color=MUTED, linewidth=1, linestyle=":")
    axes.annotate(
        f" trained length, {window:,}",
        (window, 0.02),
        xycoords=("data", "axes fraction"),
        fontsize=8,
        color=MUTED,
    )
    scale_lengths(axes, lengths)
    axes.set_xlabel("Context that the model reads (tokens)", color=INK)
    axes.set_ylabel("Perplexity, lower is better\n± one paired standard error", color=INK)
    if shown and max(shown) > LINEAR_SPAN * min(shown):
        axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.12g}"))
    row = next(iter(tables.values())).rows[0]
    of_model = f": {name}" if name else ""
    style_axes(
        axes,
        f"Reading beyond the window{of_model}",
        f"{pluralize(row.tokens, 'held-out token')} of {pluralize(row.documents, 'document')}, the "
        "same "
        f"everywhere; trained on texts of {window:,}",
    )
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    figure.savefig(path)


def _shown(value: float) -> float:
    return min(value, TALLEST) if math.isfinite(value) else math.nan
