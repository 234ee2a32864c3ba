"""Plots of evaluation results, drawn without a display."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from lctrain.eval.row import PerplexityRow
from lctrain.pluralize import pluralize

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#1f2933"
MUTED = "#616e7c"
LINE = "#0b6e99"
LINEAR_SPAN = 10
MANY_LENGTHS = 8


class RowsByLength(Protocol):
    """Protocol of a table that the plots can draw; PerplexityTable is one."""

    @property
    def rows(self) -> tuple[PerplexityRow, ...]:
        """Rows by rising context length."""

    @property
    def name(self) -> str:
        """Name of the evaluated model; may be empty."""


def plot_perplexity(table: RowsByLength, path: Path) -> None:
    """Draws perplexity against context length, with a band of one standard error.

    The band is the standard error of the loss difference from the shortest length. Both losses are
    of the same tokens, so differences between documents cancel. With a single length, an error bar
    shows the standard error of the loss over documents. The perplexity axis is logarithmic if
    perplexities span more than a factor of ten.

    Args:
        table: Table with at least one row. A perplexity that is not finite leaves a gap.
        path: PNG file to write.
    """
    from matplotlib.ticker import FuncFormatter

    if not hasattr(table, "rows"):
        raise TypeError(
            f"table must have rows by length, got {type(table).__name__}. Pass the result of "
            "perplexity_by_length."
        )
    figure = new_figure()
    axes = figure.add_subplot()
    lengths = [row.length for row in table.rows]
    perplexities = [_finite(row.perplexity) for row in table.rows]
    axes.plot(lengths, perplexities, color=LINE, marker="o", linewidth=2)
    _draw_errors(axes, table, lengths, perplexities)
    scale_lengths(axes, lengths)
    axes.set_xlabel("Context length (tokens, at most)", color=INK)
    axes.set_ylabel("Perplexity", color=INK)
    shown = [value for value in perplexities if not math.isnan(value)]
    if shown and max(shown) > LINEAR_SPAN * min(shown):
        axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.12g}"))
    axes.margins(x=0.06, y=0.18)
    _label_points(axes, lengths, perplexities)
    row = table.rows[0]
    style_axes(
        axes,
        "Perplexity by context length" + (f": {table.name}" if table.name else ""),
        f"{pluralize(row.tokens, 'held-out token')} of {pluralize(row.documents, 'document')}, "
        "the same at every length",
    )
    figure.savefig(path)


def new_figure(width: float = 7.2, height: float = 4.5) -> Figure:
    """Returns an empty figure that needs no display, with 150 dots per inch.

    Args:
        width: Width in inches.
        height: Height in inches.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _draw_errors(
    axes: Axes, table: RowsByLength, lengths: list[int], perplexities: list[float]
) -> None:
    """Draws the standard errors: a band, or an error bar if there is only one point."""
    if table.rows[0].documents < 2:
        return
    if len(lengths) > 1:
        label = "± one standard error of the difference from the shortest length"
        low, high = paired_interval(table)
        axes.fill_between(lengths, low, high, color=LINE, alpha=0.18, linewidth=0, label=label)
    else:
        label = "± one standard error over documents"
        low = [_finite(row.perplexity_low) for row in table.rows]
        high = [_finite(row.perplexity_high) for row in table.rows]
        errors = [[perplexities[0] - low[0]], [high[0] - perplexities[0]]]
        axes.errorbar(lengths, perplexities, errors, color=LINE, capsize=4, label=label)
    axes.legend(frameon=False, fontsize=8, labelcolor=MUTED)


def paired_interval(table: RowsByLength) -> tuple[list[float], list[float]]:
    """Returns an interval around each perplexity: one standard error of the loss difference.

    The difference is taken from the loss at the shortest length, on the same tokens.

    Args:
        table: Table of an evaluation. With one document the intervals have no width.

    Returns:
        Lower and upper ends of the intervals; NaN for a perplexity that is not finite.
    """
    errors = [0.0 if math.isnan(row.gain_stderr) else row.gain_stderr for row in table.rows]
    ends = [
        [
            _finite(row.perplexity * math.exp(sign * error))
            for row, error in zip(table.rows, errors, strict=True)
        ]
        for sign in (-1, 1)
    ]
    return ends[0], ends[1]


def scale_lengths(axes: Axes, lengths: list[int]) -> None:
    """Makes the horizontal axis logarithmic, with a tick at every length."""
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    if len(lengths) > MANY_LENGTHS:
        axes.tick_params(axis="x", labelrotation=45)


def _label_points(axes: Axes, lengths: list[int], perplexities: list[float]) -> None:
    from matplotlib.patheffects import withStroke

    for length, perplexity in zip(lengths, perplexities, strict=True):
        if math.isnan(perplexity):
            continue
        digits = max(0, 3 - math.floor(math.log10(perplexity)))
        axes.annotate(
            f"{perplexity:,.{min(digits, 3)}f}",
            (length, perplexity),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=INK,
            path_effects=[withStroke(linewidth=2.5, foreground="white", alpha=0.8)],
        )


def style_axes(axes: Axes, title: str, subtitle: str) -> None:
    """Writes the title and the subtitle, and hides the top and right lines of the frame."""
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK, pad=22)
    axes.text(0, 1.03, subtitle, transform=axes.transAxes, fontsize=9, color=MUTED)
    axes.grid(axis="y", color="#e4e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=MUTED, which="both")


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.nan
