"""Plot of shares or losses by length and a further column, with a heatmap for each method."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lctrain.eval.method_words import method_words
from lctrain.eval.plots import INK, MUTED, new_figure

COLUMNS = 3
_DARK = 0.6  # place in the range of colours above which a cell is dark and its text white


def plot_heatmaps(
    values: Mapping[str, np.ndarray],
    lengths: Sequence[int],
    rows: Sequence[str],
    path: Path,
    *,
    title: str,
    subtitle: str,
    row_label: str,
    is_share: bool = True,
    window: int | None = None,
) -> None:
    """Draws a heatmap per method, with a dotted line where the trained window ends.

    Args:
        values: Values of each method, [lengths, rows] float64; NaN leaves a cell empty.
        lengths: Context lengths in tokens.
        rows: Labels of the rows.
        path: PNG file to write.
        title: Title of the figure.
        subtitle: Second line of the title.
        row_label: Label of the vertical axis; may be empty.
        is_share: Whether values are shares in [0, 1], which are shown in percent.
        window: Length of the texts that the model was trained on, in tokens; None draws no line.
    """
    methods = list(values)
    columns = min(COLUMNS, len(methods))
    grid = math.ceil(len(methods) / columns)
    label_width = 0.06 * max(map(len, rows))
    width = 1.2 + label_width + 0.55 * len(lengths)
    figure = new_figure(max(4.5, columns * width), 1.1 + grid * (1.1 + 0.32 * len(rows)))
    panels = figure.subplots(grid, columns, squeeze=False).flatten()
    within = len(lengths) if window is None else sum(length <= window for length in lengths)
    low, high = (0.0, 1.0) if is_share else _range(list(values.values()))
    for axes, method in zip(panels, methods, strict=False):
        found = values[method]
        axes.imshow(found.T, vmin=low, vmax=high, cmap="Blues", aspect="auto")
        for i, j in np.ndindex(found.shape):
            value = found[i, j]
            if math.isnan(value):
                continue
            colour = "white" if value > low + _DARK * (high - low) else INK
            text = f"{value:.0%}" if is_share else f"{value:.2f}"
            axes.text(i, j, text, ha="center", va="center", fontsize=6, color=colour)
        if 0 < within < len(lengths):
            axes.axvline(within - 0.5, color=INK, linewidth=1, linestyle=":")
        axes.set_title(method_words(method), fontsize=9, color=INK)
        labels = [f"{length:,}" for length in lengths]
        axes.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
        axes.set_xlabel("Length of the text (tokens)", fontsize=8, color=INK)
        axes.set_ylabel(row_label, fontsize=8, color=INK)
        axes.set_yticks(range(len(rows)), list(rows))
        axes.tick_params(colors=MUTED, labelsize=7, length=0)
        axes.spines[:].set_visible(False)
    for axes in panels[len(methods) :]:
        axes.set_visible(False)
    figure.suptitle(f"{title}\n{subtitle}", fontsize=10, color=INK)
    figure.savefig(path)


def _range(values: Sequence[np.ndarray]) -> tuple[float, float]:
    """Returns the smallest and the largest finite value; (0, 1) if there is none."""
    found = np.concatenate([value.flatten() for value in values])
    found = found[np.isfinite(found)]
    return (float(found.min()), float(found.max())) if len(found) else (0.0, 1.0)
