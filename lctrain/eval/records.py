"""Records that evaluation tasks and their runner exchange: measures, items, results, tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lctrain.instances import require_instance

if TYPE_CHECKING:
    from lctrain.data import TokenizedDocument


@dataclass(frozen=True)
class Measure:
    """A quantity that a task measures for every item.

    Attributes:
        name: Name of its column in the files.
        label: Name for tables and pictures, with the unit; that of the exponential if there is one.
        larger_is_better: Whether a larger value is better.
        is_share: Whether it is a share in [0, 1], which is shown in percent.
        threshold: Smallest mean, or largest if smaller is better, of a length that counts as
            mastered; None if the effective length is not defined.
        exponential: Name of a further column, which holds the exponential of the mean, as tables
            and pictures show it; empty for none.
    """

    name: str
    label: str
    larger_is_better: bool = True
    is_share: bool = False
    threshold: float | None = None
    exponential: str = ""

    def reaches(self, value: float) -> bool:
        """Returns whether a mean reaches the threshold; False without a threshold."""
        if self.threshold is None:
            return False
        return value >= self.threshold if self.larger_is_better else value <= self.threshold

    def text(self, value: float) -> str:
        """Returns a value as tables show it."""
        if self.exponential:
            return f"{math.exp(min(value, 700.0)):,.3f}"
        return f"{value:.1%}" if self.is_share else f"{value:,.4f}"


@dataclass(frozen=True)
class Item:
    """The scores of one document or prompt.

    Attributes:
        id: Name of the item, the same at every method, in every run, and, if the item is the same
            text, at every length.
        totals: Sum of each measure over the units of the item, by name of the measure.
        weight: Number of units, such as scored tokens; 1 for a prompt.
        columns: Further columns of the item's row, such as its depth. Items with the same columns
            make one row.
        answer: Text that the model answered; empty for tasks without answers.
    """

    id: str
    totals: Mapping[str, float]
    weight: float = 1.0
    columns: Mapping[str, Any] = field(default_factory=dict)
    answer: str = ""

    def __post_init__(self) -> None:
        """Replaces numbers of NumPy and torch by Python's, which files can store."""
        require_instance("totals", self.totals, Mapping, "Pass a sum by the name of its measure.")
        totals = {name: float(value) for name, value in self.totals.items()}
        object.__setattr__(self, "totals", totals)
        object.__setattr__(self, "weight", float(self.weight))
        columns = {name: _plain(value) for name, value in self.columns.items()}
        object.__setattr__(self, "columns", columns)


@dataclass(frozen=True)
class Result:
    """The result of one cell: one task, read with one method, at one length.

    Attributes:
        items: Scored items.
        facts: Further numbers of the cell, such as its number of windows.
    """

    items: tuple[Item, ...]
    facts: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Replaces numbers of NumPy and torch by Python's, which files can store."""
        facts = {name: _plain(value) for name, value in self.facts.items()}
        object.__setattr__(self, "facts", facts)


@dataclass(frozen=True, eq=False)
class Subject:
    """What is evaluated: a model, its tokenizer, and text.

    Attributes:
        model: A causal LM.
        tokenizer: Tokenizer of the model; None if no task needs one.
        documents: Tokenized documents.
        window: Length of the texts that the model was trained on, in tokens, as the user gave it;
            None for that of the model's config.
        name: Name of the model; may be empty.
    """

    model: Any
    tokenizer: Any = None
    documents: Sequence[TokenizedDocument] = ()
    window: int | None = None
    name: str = ""

    def require_tokenizer(self, task: str) -> Any:
        """Returns the tokenizer.

        Args:
            task: Name of the task that needs it, for the message.

        Raises:
            ValueError: if there is none.
        """
        if self.tokenizer is None:
            raise ValueError(
                f"tokenizer must be given for {task}, got none. Set data.tokenizer of the "
                "command, or tokenizer= of the data module, or leave that task out."
            )
        return self.tokenizer


def _plain(value: Any) -> Any:
    """Returns a number of NumPy or torch as one of Python, and a list as a tuple."""
    if isinstance(value, list):
        return tuple(value)
    return value.item() if hasattr(value, "item") else value


class Table(Protocol):
    """Protocol of the result of a task. `str()` of a table is the table in text."""

    @property
    def stem(self) -> str:
        """Name of the files without their suffix."""

    def as_dicts(self) -> list[dict[str, Any]]:
        """Returns a dictionary per row, all with the same keys."""

    def metrics(self) -> dict[str, float]:
        """Returns the numbers for loggers by name."""

    def save(self, output_dir: str | Path) -> dict[str, Path]:
        """Writes a CSV, a JSON and a PNG file; returns their paths by "csv", "json" and "png"."""
