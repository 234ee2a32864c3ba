"""Run: a task with what it needs, which computes cells of methods by lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from lctrain.distributed import ONE_RANK, Topology
from lctrain.eval.cells import Cell
from lctrain.eval.limits import require_kind
from lctrain.eval.method_words import method_words
from lctrain.eval.reader import Reader
from lctrain.eval.reading import Reading
from lctrain.eval.records import Item, Result, Subject, Table
from lctrain.eval.shared_work import joined, share_of
from lctrain.eval.task import Task
from lctrain.instances import require_instance
from lctrain.limits import require


@dataclass(frozen=True, eq=False)
class Run:
    """A task with all that its cells need.

    Attributes:
        task: The task, prepared for `subject` and `lengths`.
        subject: Model, tokenizer and documents.
        readings: Ways to read.
        lengths: Context lengths in tokens, rising.
        max_tokens: Largest number of tokens in a forward pass.
        device: Device of the model.
        ranks: Ranks that share the items; all of them compute the same cells.
        cache_gib: Most memory of a paged cache in GiB; None for a share of the free memory.
    """

    task: Task
    subject: Subject
    readings: Sequence[Reading]
    lengths: tuple[int, ...]
    max_tokens: int
    device: torch.device
    ranks: Topology = ONE_RANK
    cache_gib: float | None = None

    @classmethod
    def prepared(
        cls,
        task: Task,
        subject: Subject,
        readings: Sequence[Reading],
        lengths: tuple[int, ...],
        *,
        max_tokens: int,
        device: torch.device | str | None = None,
        ranks: Topology = ONE_RANK,
    ) -> Run:
        """Prepares the task; see Task.prepare.

        Raises:
            ValueError: if the task cannot be run.
        """
        require_kind(task.name, task.reads, subject.model)
        task.prepare(subject, lengths)
        device = _device(subject.model) if device is None else torch.device(device)
        return cls(task, subject, readings, lengths, max_tokens, device, ranks)

    def same(self, reading: Reading, length: int) -> int:
        """Returns the length of the cell that is computed for a length."""
        return length if reading.scales else self.task.same_as(length)

    def cells(self) -> list[Cell]:
        """Returns the distinct cells, by method and rising length."""
        found = [
            Cell(self.task.name, reading.method, self.same(reading, length))
            for reading in self.readings
            for length in self.lengths
        ]
        return list(dict.fromkeys(found))

    def size(self, done: MutableMapping[Cell, Result]) -> int:
        """Returns the units of work of the cells that are not done."""
        return sum(self.task.size(cell.length) for cell in self.cells() if cell not in done)

    def work(self, done: MutableMapping[Cell, Result]) -> float:
        """Returns the tokens to read for the cells that are not done."""
        return sum(self.task.work(cell.length) for cell in self.cells() if cell not in done)

    def compute(
        self, done: MutableMapping[Cell, Result], bar: Bar, in_tokens: bool = False
    ) -> None:
        """Computes the cells that are not in `done`, and stores them there one by one.

        Args:
            done: Results by cell.
            bar: Progress bar.
            in_tokens: Whether the bar counts tokens to read, rather than units of the task.
        """
        for reading, words in zip(self.readings, _words(self.readings), strict=True):
            mine = [cell for cell in self.cells() if cell.method == reading.method]
            todo = [cell for cell in mine if cell not in done]
            if not todo:
                continue
            bar.say(f"{self.task.title}{words}")
            with reading.patched(self.subject.model):
                for cell in todo:
                    self._compute(reading, cell, done, bar, in_tokens)

    def compute_cell(self, cell: Cell, done: MutableMapping[Cell, Result], bar: Bar) -> None:
        """Computes one cell, and stores it in `done`."""
        (reading,) = (reading for reading in self.readings if reading.method == cell.method)
        with reading.patched(self.subject.model):
            self._compute(reading, cell, done, bar, in_tokens=True)

    def _compute(
        self,
        reading: Reading,
        cell: Cell,
        done: MutableMapping[Cell, Result],
        bar: Bar,
        in_tokens: bool,
    ) -> None:
        """Computes a cell on the patched model."""
        scale = self.task.work(cell.length) / self.task.size(cell.length) if in_tokens else 1
        with self.ranks.failing_together():
            done[cell] = self._result(reading, cell.length, partial(_move, bar, scale))

    def _result(self, reading: Reading, length: int, advance: Callable[[int], None]) -> Result:
        made = self.task.make(length)
        model, ranks = self.subject.model, self.ranks
        reader = Reader(
            model, self.device, self.max_tokens, reading.segment, advance, ranks, self.cache_gib
        )
        alone = ranks.data_size == 1 or self.task.shares_itself
        with reading.at(model, length):
            mine = made if alone else share_of(made, ranks)
            items = tuple(self.task.score(reader, length, mine))
        if not alone and len(items) != len(mine):
            raise ValueError(
                f"{self.task.name} must score an item for each part that make returns, got "
                f"{len(items)} of {len(mine)}. Set shares_itself for a task that yields others."
            )
        if not alone:
            items = tuple(joined(items, len(made), ranks))
        if not items:
            raise ValueError(
                f"{self.task.name} must score at least one {self.task.unit} at length {length}, "
                "got none. Leave the task or the length out."
            )
        self._check_totals(items)
        return Result(items, self.task.facts(length))

    def _check_totals(self, items: Sequence[Item]) -> None:
        """Raises ValueError unless every item holds all that the task measures."""
        names = {measure.name for measure in self.task.item_measures}
        for item in items:
            require(
                names <= item.totals.keys(),
                f"items of {self.task.name} must hold {', '.join(sorted(names))}, got "
                f"{', '.join(item.totals) or 'nothing'} in {item.id}. Yield all that measures "
                "names.",
            )

    def results(self, done: MutableMapping[Cell, Result]) -> dict[str, dict[int, Result]]:
        """Returns the results of all cells by method and length."""
        return {
            reading.method: {
                length: done[Cell(self.task.name, reading.method, self.same(reading, length))]
                for length in self.lengths
            }
            for reading in self.readings
        }

    def table(self, done: MutableMapping[Cell, Result]) -> Table:
        """Returns the table of the task, from the results of all of its cells."""
        return self.task.table(self.results(done))


class Bar:
    """A progress bar with the time left."""

    def __init__(self, bar: Any) -> None:
        """Wraps a tqdm bar."""
        self._bar = bar

    def say(self, text: str) -> None:
        """Shows a text before the bar."""
        self._bar.set_description(text)

    def advance(self, units: float) -> None:
        """Moves the bar by units of work."""
        self._bar.update(units)


@contextmanager
def progress_bar(total: float, unit: str, shown: bool, in_tokens: bool = False) -> Iterator[Bar]:
    """Context manager of a progress bar, which shows the time left.

    Args:
        total: Units of all the work.
        unit: Name of a unit.
        shown: Whether to show the bar.
        in_tokens: Whether units are tokens to read, which are shown in thousands and millions.
    """
    with tqdm(total=total, unit=unit, unit_scale=in_tokens, disable=not shown) as bar:
        yield Bar(bar)


def computed(run: Run, progress: bool = False) -> dict[str, dict[int, Result]]:
    """Computes all cells of a task, and returns the results by method and length.

    Args:
        run: The task and what it needs.
        progress: Whether to show a progress bar.
    """
    require_instance("run", run, Run, "Call Run.prepared.")
    done: dict[Cell, Result] = {}
    with progress_bar(run.size(done), run.task.unit, progress) as bar:
        run.compute(done, bar)
    return run.results(done)


def _move(bar: Bar, scale: float, units: int) -> None:
    bar.advance(units * scale)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _words(readings: Sequence[Reading]) -> list[str]:
    """Returns the part of the bar's text that names the method, such as ", YaRN, 2 of 3"."""
    if len(readings) == 1:
        words = method_words(readings[0].method)
        return [f", {words}" if words else ""]
    total = len(readings)
    return [f", {method_words(r.method)}, {i} of {total}" for i, r in enumerate(readings, 1)]
