"""PasskeyTable: how many passkeys a model found, as text and as files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from lctrain.eval.files import write_rows
from lctrain.eval.heatmap import plot_heatmaps
from lctrain.pluralize import pluralize


@dataclass(frozen=True, eq=False)
class PasskeyTable:
    """Number of passkeys that a model found, by method, text length and depth.

    Attributes:
        found: Number of keys found by each method, [lengths, depths] int64.
        lengths: Lengths of the texts in tokens, question and answer included.
        depths: Depths of the key: fractions of the filler text before it.
        keys: Number of keys for each length and depth.
        window: Length of the texts that the model was trained on, in tokens.
        name: Name of the model; may be empty.
        stem: Name of the files without their suffix.
    """

    stem: ClassVar[str] = "passkey_retrieval"

    found: Mapping[str, np.ndarray]
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    keys: int
    window: int
    name: str = ""

    def accuracy(self, method: str) -> np.ndarray:
        """Returns the fraction of the keys that were found, [lengths, depths] float64."""
        return self.found[method] / self.keys

    def as_dicts(self) -> list[dict[str, Any]]:
        """Returns a dictionary with counts and accuracy per method, length and depth."""
        return [
            {
                "method": method,
                "length": length,
                "depth": depth,
                "found": int(found[i, j]),
                "keys": self.keys,
                "accuracy": int(found[i, j]) / self.keys,
            }
            for method, found in self.found.items()
            for i, length in enumerate(self.lengths)
            for j, depth in enumerate(self.depths)
        ]

    def metrics(self) -> dict[str, float]:
        """Returns the share of keys found by method and length, for loggers."""
        return {
            f"passkey_{method}_{length}": float(mean)
            for method in self.found
            for length, mean in zip(self.lengths, self.accuracy(method).mean(axis=1), strict=True)
        }

    def save(self, output_dir: str | Path) -> dict[str, Path]:
        """Writes passkey_retrieval.csv, .json and .png.

        Returns:
            The paths by "csv", "json" and "png".
        """
        settings = {"name": self.name, "window": self.window, "keys_per_cell": self.keys}
        paths = write_rows(output_dir, self.stem, self.as_dicts(), settings)
        plot_heatmaps(
            {method: self.accuracy(method) for method in self.found},
            self.lengths,
            [f"{depth:.0%}" for depth in self.depths],
            paths["png"],
            title=f"Passkeys found by depth and length{f': {self.name}' if self.name else ''}",
            subtitle=(
                f"{pluralize(self.keys, 'key')} in each cell; dotted: the trained window, "
                f"{self.window:,} tokens"
            ),
            row_label="Text before the key",
            window=self.window,
        )
        return paths

    def __str__(self) -> str:
        lines = [
            f"Passkeys found{f' by {self.name}' if self.name else ''}: "
            f"{pluralize(self.keys, 'key')} in each cell, window {self.window:,}; depth is the "
            "share "
            "of the text before the key"
        ]
        for method in self.found:
            accuracy = self.accuracy(method)
            lines.append(f"{method:<12}" + "".join(f"{n:>9,}" for n in self.lengths))
            for j, depth in enumerate(self.depths):
                cells = "".join(f"{value:>9.0%}" for value in accuracy[:, j])
                lines.append(f"  {f'depth {depth:.2f}':<10}" + cells)
            lines.append(f"  {'mean':<10}" + "".join(f"{v:>9.0%}" for v in accuracy.mean(axis=1)))
        return "\n".join(lines)
