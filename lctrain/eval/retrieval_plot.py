"""Plot of a PasskeyTable: a heatmap of depth by length for each method."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lctrain.eval.method_words import method_words
from lctrain.eval.plots import INK, MUTED, new_figure
from lctrain.pluralize import pluralize

COLUMNS = 3
_DARK = 0.6  # accuracy above which a cell is dark and its text white


def plot_retrieval(
    accuracy: Mapping[str, np.ndarray],
    lengths: Sequence[int],
    depths: Sequence[float],
    keys: int,
    window: int,
    name: str,
    path: Path,
) -> None:
    """Draws a heatmap per method, with a dotted line where the trained window ends.

    Args:
        accuracy: Fraction of keys found by each method, [lengths, depths]; at least one method.
        lengths: Lengths of the texts in tokens.
        depths: Depths of the key: fractions of the filler text before it.
        keys: Number of keys for each length and depth.
        window: Length of the texts that the model was trained on, in tokens.
        name: Name of the model; may be empty.
        path: PNG file to write.
    """
    methods = list(accuracy)
    columns = min(COLUMNS, len(methods))
    rows = math.ceil(len(methods) / columns)
    width = 1.2 + 0.55 * len(lengths)
    figure = new_figure(max(4.5, columns * width), 1.1 + rows * (1.1 + 0.32 * len(depths)))
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    within = sum(length <= window for length in lengths)
    for axes, method in zip(panels, methods, strict=False):
        found = accuracy[method]
        axes.imshow(found.T, vmin=0.0, vmax=1.0, cmap="Blues", aspect="auto")
        for (i, j), value in [((i, j), found[i, j]) for i, j in _cells(found.shape)]:
            colour = "white" if value > _DARK else INK
            axes.text(i, j, f"{value:.0%}", ha="center", va="center", fontsize=6, color=colour)
        if 0 < within < len(lengths):
            axes.axvline(within - 0.5, color=INK, linewidth=1, linestyle=":")
        axes.set_title(method_words(method), fontsize=9, color=INK)
        labels = [f"{length:,}" for length in lengths]
        axes.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
        axes.set_xlabel("Length of the text (tokens)", fontsize=8, color=INK)
        axes.set_ylabel("Text before the key", fontsize=8, color=INK)
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axes.tick_params(colors=MUTED, labelsize=7, length=0)
        axes.spines[:].set_visible(False)
    for axes in panels[len(methods) :]:
        axes.set_visible(False)
    of_model = f": {name}" if name else ""
    figure.suptitle(
        f"Passkeys found by depth and length{of_model}\n{pluralize(keys, 'key')} in each cell; "
        f"dotted: the trained window, {window:,} tokens",
        fontsize=10,
        color=INK,
    )
    figure.savefig(path)


def _cells(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    return [(i, j) for i in range(shape[0]) for j in range(shape[1])]
