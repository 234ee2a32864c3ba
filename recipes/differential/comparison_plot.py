"""Plots held-out loss, largest logit and passkeys of the variants, with a point for every seed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lctrain.eval.plots import INK, new_figure, scale_lengths, style_axes

COLOURS = {"plain": "#616e7c", "v1": "#0b6e99", "v2": "#d55e00"}
PANELS = (("held_out_loss", "Held-out loss"), ("largest_logit", "Largest attention logit"))


def plot_comparison(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws one panel per quantity.

    Args:
        runs: Results of at least one run.
        path: PNG file to write.
    """
    figure = new_figure(11.0, 3.8)
    first, second, third = figure.subplots(1, 3)
    names = list(dict.fromkeys(run["variant"] for run in runs))
    for axes, (column, title) in zip((first, second), PANELS, strict=True):
        for place, name in enumerate(names):
            values = [run[column] for run in runs if run["variant"] == name]
            colour = COLOURS[name]
            axes.plot([place] * len(values), values, "o", color=colour, alpha=0.6)
            mean = sum(values) / len(values)
            axes.hlines(mean, place - 0.25, place + 0.25, color=colour, linewidth=2)
        axes.set_xticks(range(len(names)), names)
        axes.set_xlim(-0.6, len(names) - 0.4)
        style_axes(axes, title, "a point per seed, and their mean")
    second.set_ylim(bottom=0.0)
    lengths = [int(length) for length in runs[0]["passkeys"]]
    for name in names:
        group = [run["passkeys"] for run in runs if run["variant"] == name]
        means = [sum(found[str(n)] for found in group) / len(group) for n in lengths]
        third.plot(lengths, means, "o-", color=COLOURS[name], label=name)
    scale_lengths(third, lengths)
    third.set_ylim(-0.03, 1.03)
    third.set_xlabel("Tokens of the text", color=INK)
    style_axes(third, "Passkeys found", "mean over seeds and depths")
    third.legend(frameon=False, fontsize=8)
    figure.savefig(path)
