"""draw_curve: draws peak memory and speed of training steps against the context length."""

from __future__ import annotations

from pathlib import Path

from lctrain_kernels.bench.memory_report import SEVERAL, Points, is_estimate
from lctrain_kernels.bench.peers import OURS


def draw_curve(points: Points, path: Path) -> None:
    """Draws two panels with a line per contender, as a PNG.

    Estimates have hollow markers and no line; packs of several documents have squares.

    Args:
        points: Runs by contender and number of tokens, from `curve_of`.
        path: The PNG file to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 3.6), dpi=120, layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, value, title in zip(
        panels, ("peak_gib", "tokens_per_s"), ("Peak GPU memory, GiB", "Tokens/s"), strict=True
    ):
        lengths = sorted({tokens for runs in points.values() for tokens in runs})
        for contender, runs in sorted(points.items()):
            measured = sorted(length for length in runs if not is_estimate(runs[length]))
            values = [runs[length][value] for length in measured]
            (line,) = axes.plot(
                measured,
                values,
                marker="s" if SEVERAL in contender else "o",
                linewidth=2.5 if contender == OURS else 1.5,
                label=contender if measured else None,
            )
            guesses = [length for length in runs if is_estimate(runs[length])]
            guessed = sorted(length for length in guesses if value in runs[length])
            if guessed:
                axes.plot(
                    guessed,
                    [runs[length][value] for length in guessed],
                    linestyle="none",
                    marker="o",
                    markerfacecolor="none",
                    color=line.get_color(),
                    label=f"{contender}, estimated",
                )
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{length // 1024}k" for length in lengths])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_xlabel("Tokens of a pack, one document unless said")
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize="small")
    figure.savefig(path)
