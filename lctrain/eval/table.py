"""PerplexityTable: the result of `perplexity_by_length`, as text and as files."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lctrain.eval.files import write_rows
from lctrain.eval.plots import count, plot_perplexity
from lctrain.eval.row import PerplexityRow

FILE_STEM = "perplexity_by_length"


@dataclass(frozen=True)
class PerplexityTable:
    """Perplexity at several context lengths, over the same tokens at each.

    Attributes:
        rows: by rising length.
        name: what was evaluated, for the title of the plot.
        overlap: fraction of a window that was only context.
        min_context: scored tokens had at least this many predecessors.
        stride: positions that a window scored at every length; None for a share of each length.
        begin_tokens: what the tokenizer's texts begin with; none if they do not, or it is unknown.
    """

    rows: tuple[PerplexityRow, ...]
    name: str = ""
    overlap: float = 0.5
    min_context: int = 1
    stride: int | None = None
    begin_tokens: tuple[int, ...] = ()

    @property
    def begun(self) -> str:
        """Sentence on how many windows began with the begin tokens; may be empty."""
        if not self.begin_tokens:
            return ""
        if all(row.begun == row.windows for row in self.rows):
            return "every window begins with the begin token"
        cells = ", ".join(
            f"{row.begun:,} of {row.windows:,} at {row.length:,}" for row in self.rows
        )
        return f"windows that begin with the begin token: {cells}"

    def as_dicts(self) -> list[dict[str, Any]]:
        """One dictionary per length, with the attributes of PerplexityRow."""
        return [dataclasses.asdict(row) for row in self.rows]

    def save(self, output_dir: str | Path) -> dict[str, Path]:
        """Writes perplexity_by_length.csv, .json and .png: see `write_rows`.

        Returns:
            The paths by "csv", "json" and "png".
        """
        settings = {
            "name": self.name,
            "overlap": self.overlap,
            "stride": self.stride,
            "min_context": self.min_context,
            "begin_tokens": list(self.begin_tokens),
        }
        paths = write_rows(output_dir, FILE_STEM, self.as_dicts(), settings)
        plot_perplexity(self, paths["png"])
        return paths

    def unreached(self) -> list[str]:
        """A sentence about lengths that the documents do not fill, if there are any.

        Such rows have the same contexts as a shorter one: more length added nothing.
        """
        last = self.rows[-1]
        alike = [row for row in self.rows if row.mean_context == last.mean_context]
        if len(alike) < 2 and last.mean_context >= last.length / 4:
            return []
        return [
            f"length {last.length:,} was not reached: a scored token saw {last.mean_context:,.0f} "
            "tokens on average, as many as the documents hold. Use longer documents, or leave it "
            "out."
        ]

    def __str__(self) -> str:
        head = self.rows[0]
        lines = [
            f"Perplexity by context length{f' of {self.name}' if self.name else ''}: "
            f"{count(head.tokens, 'token')} of {count(head.documents, 'document')}, "
            "the same at every length",
            f"{'length':>10}{'mean context':>14}{'perplexity':>20}{'loss':>18}{'gain':>20}",
        ]
        for row in self.rows:
            half_width = row.perplexity * row.stderr
            lines.append(
                f"{row.length:>10,}{row.mean_context:>14,.1f}"
                f"{_with_error(row.perplexity, half_width, 2):>20}"
                f"{_with_error(row.loss, row.stderr, 4):>18}"
                f"{_with_error(row.gain, row.gain_stderr, 4):>20}"
            )
        lines.append(
            "± one standard error over documents; gain: loss at the shortest length minus this loss"
        )
        lines += self.unreached()
        if self.begun:
            lines.append(self.begun)
        return "\n".join(lines)


def _with_error(value: float, error: float, digits: int) -> str:
    text = f"{round(value, digits) + 0.0:,.{digits}f}"  # + 0.0: no -0.0000
    return text if math.isnan(error) else f"{text} ±{error:,.{digits}f}"
