"""PerplexityTable: the result of `perplexity_by_length`, as text and as files."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lctrain.eval.files import write_rows
from lctrain.eval.plots import plot_perplexity
from lctrain.eval.row import PerplexityRow
from lctrain.pluralize import pluralize


@dataclass(frozen=True)
class PerplexityTable:
    """Perplexity of the same tokens at several context lengths.

    Attributes:
        rows: Rows by rising context length.
        name: Name of the evaluated model, for the title of the plot; may be empty.
        overlap: Fraction of a window that was context and not scored.
        min_context: Smallest number of preceding tokens of a scored token.
        stride: Number of positions that a window scored, the same at every length; None for (1 -
            overlap) * length.
        begin_tokens: Begin tokens that the tokenizer adds; empty if it adds none, or the tokenizer
            is unknown.
        stem: Name of the files without their suffix.
    """

    stem: ClassVar[str] = "perplexity_by_length"

    rows: tuple[PerplexityRow, ...]
    name: str = ""
    overlap: float = 0.5
    min_context: int = 1
    stride: int | None = None
    begin_tokens: tuple[int, ...] = ()

    @property
    def begun(self) -> str:
        """Sentence about the windows that began with the begin tokens; may be empty."""
        if not self.begin_tokens:
            return ""
        if all(row.begun == row.windows for row in self.rows):
            return "every window begins with the begin token"
        cells = ", ".join(
            f"{row.begun:,} of {row.windows:,} at {row.length:,}" for row in self.rows
        )
        return f"windows that begin with the begin token: {cells}"

    def as_dicts(self) -> list[dict[str, Any]]:
        """Returns a dictionary per length, with the attributes of PerplexityRow."""
        return [dataclasses.asdict(row) for row in self.rows]

    def metrics(self) -> dict[str, float]:
        """Returns the perplexities by length, for loggers."""
        return {f"perplexity_{row.length}": row.perplexity for row in self.rows}

    def save(self, output_dir: str | Path) -> dict[str, Path]:
        """Writes perplexity_by_length.csv, .json and .png: see `write_rows`.

        Returns:
            The paths of the files by "csv", "json" and "png".
        """
        settings = {
            "name": self.name,
            "overlap": self.overlap,
            "stride": self.stride,
            "min_context": self.min_context,
            "begin_tokens": list(self.begin_tokens),
        }
        paths = write_rows(output_dir, self.stem, self.as_dicts(), settings)
        plot_perplexity(self, paths["png"])
        return paths

    def short(self) -> list[str]:
        """Returns a line in a list that counts documents of fewer tokens than a length."""
        counts = [
            f"{row.short_documents} of {row.documents} at {row.length:,}"
            for row in self.rows
            if row.short_documents
        ]
        if not counts:
            return []
        return [
            "documents shorter than a length, scored with the context that they have: "
            f"{', '.join(counts)}"
        ]

    def unreached(self) -> list[str]:
        """Returns a warning in a list if the documents are too short for the longest length.

        If no document is longer than a shorter length, the longer one gives the same contexts.
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
            f"{pluralize(head.tokens, 'token')} of {pluralize(head.documents, 'document')}, "
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
        if not math.isnan(head.interval_low):
            ends = ", ".join(
                f"{row.interval_low:,.2f} to {row.interval_high:,.2f} at {row.length:,}"
                for row in self.rows
            )
            lines.append(f"95 % intervals of the perplexity, bootstrap over documents: {ends}")
        lines += [*self.short(), *self.unreached()]
        if self.begun:
            lines.append(self.begun)
        return "\n".join(lines)


def _with_error(value: float, error: float, digits: int) -> str:
    text = f"{round(value, digits) + 0.0:,.{digits}f}"  # + 0.0: no -0.0000
    return text if math.isnan(error) else f"{text} ±{error:,.{digits}f}"
