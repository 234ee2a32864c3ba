"""Plot of a PasskeyTable: a heatmap of depth by length for each method."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from lctrain.eval.plots import INK, MUTED, count, new_figure

if TYPE_CHECKING:
    from lctrain.eval.retrieval import PasskeyTable

COLUMNS = 3
_DARK = 0.6  # of the colour map: white text from here on


def plot_retrieval(table: PasskeyTable, path: Path) -> None:
    """Draws one panel per method; the dotted line is where the trained window ends.

    Args:
        table: Table of at least one method.
        path: PNG file to write.
    """
    methods = list(table.found)
    columns = min(COLUMNS, len(methods))
    rows = math.ceil(len(methods) / columns)
    width = 1.2 + 0.55 * len(table.lengths)
    figure = new_figure(max(4.5, columns * width), 1.1 + rows * (1.1 + 0.32 * len(table.depths)))
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    within = sum(length <= table.window for length in table.lengths)
    for axes, method in zip(panels, methods, strict=False):
        accuracy = table.accuracy(method)  # [lengths, depths]
        axes.imshow(accuracy.T, vmin=0.0, vmax=1.0, cmap="Blues", aspect="auto")
        for (i, j), value in [((i, j), accuracy[i, j]) for i, j in _cells(accuracy.shape)]:
            colour = "white" if value > _DARK else INK
            axes.text(i, j, f"{value:.0%}", ha="center", va="center", fontsize=6, color=colour)
        if 0 < within < len(table.lengths):
            axes.axvline(within - 0.5, color=INK, linewidth=1, linestyle=":")
        axes.set_title(method, fontsize=10, color=INK)
        labels = [f"{length:,}" for length in table.lengths]
        axes.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
        axes.set_xlabel("Length of the text (tokens)", fontsize=8, color=INK)
        axes.set_ylabel("Depth of the key", fontsize=8, color=INK)
        axes.set_yticks(range(len(table.depths)), [f"{depth:.0%}" for depth in table.depths])
        axes.tick_params(colors=MUTED, labelsize=7, length=0)
        axes.spines[:].set_visible(False)
    for axes in panels[len(methods) :]:
        axes.set_visible(False)
    of_model = f": {table.name}" if table.name else ""
    figure.suptitle(
        f"Passkeys found by depth and length{of_model}\n{count(table.keys, 'key')} in each cell; "
        f"dotted: the trained window, {table.window:,} tokens",
        fontsize=10,
        color=INK,
    )
    figure.savefig(path)


def _cells(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    return [(i, j) for i in range(shape[0]) for j in range(shape[1])]
