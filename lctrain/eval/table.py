"""PerplexityTable: the result of `perplexity_by_length`, as text and as files."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lctrain.eval.plots import count, plot_perplexity

FILE_STEM = "perplexity_by_length"


@dataclass(frozen=True)
class PerplexityRow:
    """How well the same tokens are predicted with contexts of at most `length` tokens.

    Attributes:
        length: most tokens of context.
        perplexity: exp(loss).
        perplexity_low: exp(loss - stderr).
        perplexity_high: exp(loss + stderr).
        loss: token-weighted mean of the negative log-likelihood, nats per token.
        stderr: standard error of `loss` over documents (see `token_mean`); NaN for one document.
        gain: loss at the shortest length minus this loss. Both are of the same tokens, so the
            differences between documents cancel, and `gain_stderr` is the right yardstick for
            whether more context helps.
        gain_stderr: standard error of `gain` over documents.
        mean_context: tokens that a scored token really saw, on average. It stops growing with
            `length` where the documents end.
        documents: documents with a scored token.
        tokens: scored tokens.
        windows: windows that were run.
        begun: number of windows that began with the begin tokens; 0 without begin tokens.
    """

    length: int
    perplexity: float
    perplexity_low: float
    perplexity_high: float
    loss: float
    stderr: float
    gain: float
    gain_stderr: float
    mean_context: float
    documents: int
    tokens: int
    windows: int = 0
    begun: int = 0


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
        """Writes perplexity_by_length.csv, .json and .png.

        Numbers that do not exist (the standard error of one document) are empty in the CSV and null
        in the JSON.

        Returns:
            The paths by "csv", "json" and "png".
        """
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        paths = {kind: folder / f"{FILE_STEM}.{kind}" for kind in ("csv", "json", "png")}
        rows = [{key: finite(value) for key, value in row.items()} for row in self.as_dicts()]
        with paths["csv"].open("w", newline="") as file:
            writer = csv.DictWriter(
                file, [field.name for field in dataclasses.fields(PerplexityRow)]
            )
            writer.writeheader()
            writer.writerows(rows)
        settings = {
            "name": self.name,
            "overlap": self.overlap,
            "stride": self.stride,
            "min_context": self.min_context,
            "begin_tokens": list(self.begin_tokens),
        }
        paths["json"].write_text(
            json.dumps({**settings, "rows": rows}, indent=2, allow_nan=False) + "\n"
        )
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


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _with_error(value: float, error: float, digits: int) -> str:
    text = f"{round(value, digits) + 0.0:,.{digits}f}"  # + 0.0: no -0.0000
    return text if math.isnan(error) else f"{text} ±{error:,.{digits}f}"
