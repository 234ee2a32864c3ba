"""Task: the protocol of an evaluation task.

A task makes documents or prompts for one context length, scores them one by one, and states what
its scores measure. The runner, the tables, the plots and the report know a task only by this
protocol.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from lctrain.eval.measure_table import MeasureTable
from lctrain.eval.reader import Reader
from lctrain.eval.records import Item, Measure, Result, Subject, Table


class Task(ABC):
    """Base class of evaluation tasks.

    The runner calls `prepare` once, then `make` and `score` for every method and length, and at
    last `table`.

    Attributes:
        name: Name in `tasks`, and of the files.
        measures: What the task measures, the most important one first.
        title: Name for pictures and progress bars.
        unit: Name of an item.
        shares_itself: Whether `score` divides the work over `reader.ranks`, and yields all items on
            all ranks. Otherwise every rank scores some of what `make` returns, an item for each.
        reads: Kind of model that the task reads with: "causal", or "mlm" for a masked language
            model.
        lengths: Context lengths of this task in tokens; None for those of the evaluation.
        methods: Methods of reading beyond the window of this task; None for those of the
            evaluation.
        subject: Model, tokenizer and documents; set by `prepare`.
    """

    name: str = ""
    measures: ClassVar[tuple[Measure, ...]]
    title: ClassVar[str]
    unit: ClassVar[str] = "item"
    shares_itself: ClassVar[bool] = False
    reads: ClassVar[str] = "causal"
    lengths: Sequence[int] | None = None
    methods: Sequence[str] | None = None
    subject: Subject

    def prepare(self, subject: Subject, lengths: tuple[int, ...]) -> None:
        """Checks the task against model, tokenizer and lengths, before anything is computed.

        The method of the base class stores the subject.

        Args:
            subject: Model, tokenizer and documents.
            lengths: Context lengths in tokens, rising.

        Raises:
            ValueError: if the task cannot be run.
        """
        self.subject = subject

    @abstractmethod
    def make(self, length: int) -> Sequence[Any]:
        """Returns the documents or prompts of one length, which depend on the seed only.

        Args:
            length: Context length in tokens.
        """

    @abstractmethod
    def score(self, reader: Reader, length: int, made: Sequence[Any]) -> Iterable[Item]:
        """Yields the scores of items. It calls `reader.advance` for the progress bar.

        Args:
            reader: The model, with the settings of its forward passes.
            length: Context length in tokens.
            made: Result of `make` for this length.
        """

    @abstractmethod
    def size(self, length: int) -> int:
        """Returns the number of units at one length by which `score` advances the progress bar."""

    @property
    def item_measures(self) -> tuple[Measure, ...]:
        """What the totals of every item hold, by which stored runs are compared."""
        return self.measures

    def work(self, length: int) -> float:
        """Returns the tokens to read at one length, from which the time left is estimated."""
        return self.size(length) * length

    def facts(self, length: int) -> dict[str, float]:
        """Returns further numbers of one length, which are stored beside the scores."""
        return {}

    def same_as(self, length: int) -> int:
        """Returns the smallest length that gives the same items as `length`."""
        return length

    def table(self, results: Mapping[str, Mapping[int, Result]]) -> Table:
        """Returns the table of all results.

        Args:
            results: Results by method and length. The method is "" for the model as it is.
        """
        return MeasureTable.of(
            self.name, self.title, self.unit, self.measures, results, self.subject
        )
