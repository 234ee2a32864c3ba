"""compare_methods: perplexity by context length, for each method of reading beyond the window."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lctrain.eval.begin import NO_BEGIN, BeginTokens
from lctrain.eval.comparison_plot import plot_comparison
from lctrain.eval.extension import Extension
from lctrain.eval.files import write_rows
from lctrain.eval.method_words import of_methods
from lctrain.eval.perplexity import perplexity_by_length
from lctrain.eval.row import PerplexityRow
from lctrain.eval.table import PerplexityTable
from lctrain.limits import check_lengths
from lctrain.pluralize import pluralize

if TYPE_CHECKING:
    from lctrain.data import TokenizedDocument

FILE_STEM = "perplexity_by_method"


@dataclass(frozen=True)
class MethodComparison:
    """Perplexity of the same tokens, by method and context length.

    Attributes:
        tables: Table of each method, with a row per context length.
        window: Length of the texts that the model was trained on, in tokens.
        name: Name of the model; may be empty.
    """

    tables: Mapping[str, PerplexityTable]
    window: int
    name: str = ""

    def ratio(self, method: str, row: PerplexityRow) -> float:
        """Returns a perplexity divided by the method's perplexity at the trained window.

        The divisor is the perplexity at the longest length within the window; NaN if there is none.

        Args:
            method: Name of the method.
            row: Row of the method's table.
        """
        within = [r for r in self.tables[method].rows if r.length <= self.window]
        return row.perplexity / within[-1].perplexity if within else math.nan

    def as_dicts(self) -> list[dict[str, Any]]:
        """Returns a dictionary per method and length: method, PerplexityRow and `ratio`."""
        return [
            {
                "method": method,
                **dataclasses.asdict(row),
                "ratio_to_window": self.ratio(method, row),
            }
            for method, table in self.tables.items()
            for row in table.rows
        ]

    def save(self, output_dir: str | Path) -> dict[str, Path]:
        """Writes perplexity_by_method.csv, .json and .png; see PerplexityTable.save.

        Returns:
            The paths by "csv", "json" and "png".
        """
        table = next(iter(self.tables.values()))
        settings = {
            "name": self.name,
            "window": self.window,
            "stride": table.stride,
            "min_context": table.min_context,
            "begin_tokens": list(table.begin_tokens),
        }
        paths = write_rows(output_dir, FILE_STEM, self.as_dicts(), settings)
        plot_comparison(self.tables, self.window, self.name, paths["png"])
        return paths

    def __str__(self) -> str:
        first = next(iter(self.tables.values()))
        head = first.rows[0]
        widths = {method: max(20, len(method) + 2) for method in self.tables}
        lines = [
            f"Perplexity by context length and method{f' of {self.name}' if self.name else ''}: "
            f"{pluralize(head.tokens, 'token')} of {pluralize(head.documents, 'document')}, the "
            "same in "
            f"every cell; window {self.window:,}",
            f"{'length':>10}" + "".join(f"{m:>{width}}" for m, width in widths.items()),
        ]
        for index, row in enumerate(first.rows):
            cells = [
                f"{self._cell(method, table.rows[index]):>{widths[method]}}"
                for method, table in self.tables.items()
            ]
            lines.append(f"{row.length:>10,}" + "".join(cells))
        lines.append(
            "in brackets: over the same method's perplexity at the window; standard errors over "
            "documents are in the files"
        )
        if first.begun:
            lines.append(first.begun)
        return "\n".join(lines)

    def _cell(self, method: str, row: PerplexityRow) -> str:
        ratio = self.ratio(method, row)
        text = f"{row.perplexity:,.2f}" if row.perplexity < 1e6 else f"{row.perplexity:.1e}"
        if math.isnan(ratio):
            return text
        return f"{text} ({ratio:.3f})" if ratio < 1e4 else f"{text} ({ratio:.0e})"


def compare_methods(
    model: nn.Module,
    documents: Sequence[TokenizedDocument],
    lengths: Sequence[int],
    extensions: Sequence[Extension],
    *,
    max_tokens: int,
    device: torch.device | str | None = None,
    stride: int | None = None,
    min_context: int | None = None,
    begin: BeginTokens = NO_BEGIN,
    progress: bool = False,
    name: str = "",
) -> MethodComparison:
    """Measures the perplexity of the same tokens, at every length and with every method.

    By default, the first max(lengths) - stride positions of a document are not scored. Each window
    scores `stride` positions, so at a length of n every scored token is predicted from more than n
    - stride and at most n tokens. Also scoring the first positions would include tokens whose
    context lies within the trained window, and so hide a failure beyond the window.

    Args:
        model: A causal LM that is not patched; it is unchanged afterwards.
        documents: Tokenized documents. Documents that are too short to be scored are left out.
        lengths: Context lengths in tokens.
        extensions: The methods to compare, all with the same window.
        max_tokens: Largest number of tokens in a forward pass.
        device: Device of the model; None takes the device of its first parameter.
        stride: Number of positions that a window scores; None for half of the shortest length.
        min_context: Smallest number of preceding tokens of a scored token; None for max(lengths) -
            stride + 1.
        begin: Begin tokens of the windows; see `begin_tokens`.
        progress: Whether to show a progress bar.
        name: Name of the model.

    Returns:
        The comparison. `str()` of it is a table in text, and `save(folder)` writes files.

    Raises:
        ValueError: if a length or option is out of range, no token can be scored, or the model does
            not support a method.
    """
    lengths = check_lengths(lengths, max_tokens)
    stride = max(1, lengths[0] // 2) if stride is None else stride
    if min_context is None:
        min_context = max(1, lengths[-1] - stride + 1)
    tables = {}
    for extension, words in zip(extensions, of_methods(extensions), strict=True):
        with extension.patched(model):
            tables[extension.method] = perplexity_by_length(
                model,
                documents,
                lengths,
                max_tokens=max_tokens,
                device=device,
                stride=stride,
                min_context=min_context,
                extension=extension,
                begin=begin,
                progress=words if progress else False,
                name=extension.method,
            )
    return MethodComparison(tables, extensions[0].window, name)
