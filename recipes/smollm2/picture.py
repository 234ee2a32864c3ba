"""Draws what the recipe measured: gains from context within the window and beyond it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lctrain.eval.plots import INK, LINE, MUTED, new_figure, scale_lengths, style_axes
from lctrain.pluralize import pluralize
from lctrain.recipes.smollm2.records import Record, gains_beyond, summed_gains

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {
    "plain": "#9aa5b1",
    "linear": "#c0a000",
    "ntk": "#7b5ea7",
    "yarn": "#d55e00",
    "dual_chunk": "#0b6e99",
    "dual_chunk_yarn": "#00916e",
    "intra_chunk": "#616e7c",
}
LOWEST = -0.5
"""Smallest gain in the picture, in nats per token: methods that fail lie far below."""


def draw(records: Mapping[str, Record], path: Path) -> None:
    """Draws a panel for each of the stages `gain` and `beyond` that is recorded.

    Args:
        records: Records by the name of their stage.
        path: PNG file to write.

    Raises:
        ValueError: if neither stage is recorded.
    """
    panels = [stage for stage in PANELS if stage in records]
    if not panels:
        raise ValueError(
            "records must hold the stage gain or beyond, got neither. Run one of them first."
        )
    figure = new_figure(width=5.2 * len(panels) + 1)
    for number, stage in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), number + 1)
        PANELS[stage](axes, records[stage])
    figure.savefig(path)


def _draw_gain(axes: Axes, record: Record) -> None:
    lengths, gains = zip(*summed_gains(record), strict=True)
    axes.plot(lengths, gains, color=LINE, marker="o", linewidth=2)
    for length, gain in zip(lengths[1:], gains[1:], strict=True):
        axes.annotate(
            f"{gain:.3f}",
            (length, gain),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=INK,
        )
    axes.margins(x=0.08, y=0.18)
    count = record["rows"][0]["items"]
    _style(axes, list(lengths), "Gain from context", f"over {lengths[0]:,} tokens", count)


def _draw_beyond(axes: Axes, record: Record) -> None:
    lengths: list[int] = []
    for method, points in gains_beyond(record).items():
        lengths = [length for length, _ in points]
        gains = [gain for _, gain in points]
        axes.plot(lengths, gains, color=COLOURS[method], marker="o", linewidth=1.8, label=method)
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, LOWEST), high)
    axes.legend(
        frameon=False, fontsize=8, labelcolor=MUTED, loc="upper left", bbox_to_anchor=(1.0, 1.0)
    )
    count = record["rows"][0]["documents"]
    _style(axes, lengths, "Beyond the window", f"over {record['window']:,} tokens", count)


def _style(axes: Axes, lengths: list[int], title: str, over: str, novels: int) -> None:
    scale_lengths(axes, lengths)
    axes.set_xlabel("Context length (tokens, at most)", color=INK)
    axes.set_ylabel(f"Gain {over} (nats per token)", color=INK)
    subtitle = f"SmolLM2-135M-Instruct, {pluralize(novels, 'novel')}, the same tokens"
    style_axes(axes, title, subtitle)


PANELS = {"gain": _draw_gain, "beyond": _draw_beyond}
"""Functions that draw a stage into axes, by the name of the stage."""
