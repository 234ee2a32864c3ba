"""LengthStages: the packed length of every stage of training, and the part of a row in each batch.

Rows are packed once, at their full length. A stage of a shorter length divides each row into equal
parts, and the parts are consecutive batches of the same rank. So the rows and their order do not
depend on the stages, and batch n is a pure function of n.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from lctrain.batch import PackedBatch
from lctrain.data.loader import RowStream
from lctrain.data.training_order import TrainingOrder
from lctrain.limits import require

ATTRIBUTE = "length_stages"  # of the callback in which the data module finds the stages


@dataclass(frozen=True)
class LengthStages:
    """Packed lengths by optimizer step.

    Attributes:
        steps: First optimizer step of each stage, rising from 0.
        lengths: Number of tokens of a pack in each stage, rising.
    """

    steps: tuple[int, ...]
    lengths: tuple[int, ...]

    @classmethod
    def read(cls, stages: Any) -> LengthStages:
        """Builds stages from a mapping of first optimizer steps to lengths.

        Raises:
            ValueError: if a step or a length is not valid, or they do not rise.
        """
        require(
            isinstance(stages, Mapping) and 0 in stages,
            f"stages must be a mapping with a length at step 0, got {stages!r}. Use for example "
            "{0: 8192, 1000: 32768}.",
        )
        for name, values, least in (("steps", list(stages), 0), ("lengths", stages.values(), 2)):
            for value in values:
                require(
                    type(value) is int and value >= least,
                    f"stages must have {name} that are integers of at least {least}, got "
                    f"{value!r}. Use for example {{0: 8192, 1000: 32768}}.",
                )
        steps = sorted(stages)
        lengths = [stages[step] for step in steps]
        require(
            all(a < b for a, b in itertools.pairwise(lengths)),
            f"stages must have rising lengths, got {', '.join(map(str, lengths))}. Leave out "
            "stages that do not grow.",
        )
        return cls(tuple(steps), tuple(lengths))

    @classmethod
    def of(cls, trainer: Any) -> LengthStages | None:
        """Returns the stages of the trainer's callback LengthSchedule; None without it."""
        found = [getattr(one, ATTRIBUTE, None) for one in getattr(trainer, "callbacks", ())]
        return next((stages for stages in found if stages is not None), None)

    def length_at(self, step: int) -> int:
        """Returns the packed length of an optimizer step."""
        return self.lengths[bisect_right(self.steps, step) - 1]

    def tokens_before(self, step: float) -> float:
        """Returns the tokens of a pack, summed over the optimizer steps before a step."""
        ends = [*self.steps[1:], float("inf")]
        stages = zip(self.steps, ends, self.lengths, strict=True)
        return sum(max(min(step, end) - begin, 0) * length for begin, end, length in stages)

    def check_rows(self, max_tokens: int) -> None:
        """Raises ValueError unless rows of `max_tokens` tokens can be divided into the lengths."""
        for length in self.lengths:
            require(
                length <= max_tokens and max_tokens % length == 0,
                f"stages must have lengths that divide max_tokens={max_tokens}, got {length}. Set "
                f"max_tokens to a multiple of {math.lcm(*self.lengths)}, or choose other lengths.",
            )


class RowPart(NamedTuple):
    """A part of a row: the one with number `part`, of `parts` equal ones."""

    row: int
    part: int
    parts: int


class PartOrder:
    """Which row and part each batch of a rank reads.

    If a stage ends inside a row, the row's other parts are left out.

    Args:
        stages: Lengths by optimizer step.
        max_tokens: Capacity of a row in tokens.
        accumulated: Number of batches of an optimizer step.
    """

    def __init__(self, stages: LengthStages, max_tokens: int, accumulated: int) -> None:
        self._parts = [max_tokens // length for length in stages.lengths]
        self._batches = [step * accumulated for step in stages.steps]
        self._rows = [0]  # read before each stage
        for index in range(len(self._batches) - 1):
            count = self._batches[index + 1] - self._batches[index]
            self._rows.append(self._rows[-1] + -(-count // self._parts[index]))

    def __call__(self, batch: int) -> RowPart:
        """Returns the part of batch `batch`. Its row counts the rows of this rank over epochs."""
        stage = bisect_right(self._batches, batch) - 1
        rows, part = divmod(batch - self._batches[stage], self._parts[stage])
        return RowPart(self._rows[stage] + rows, part, self._parts[stage])


class PartStream(RowStream):
    """RowStream of parts of rows.

    Args:
        order: Which part each batch reads.
        **options: Arguments of RowStream.
    """

    def __init__(self, order: PartOrder, **options: Any) -> None:
        super().__init__(**options)
        self._order = order

    def __iter__(self) -> Iterator[Any]:
        for number in self._numbers():
            row, part, parts = self._order(number)
            yield RowPart(self.row(row), part, parts)

    def epoch_of(self, number: int) -> int:
        """Returns the number of the pass over the rows to which a batch belongs."""
        return super().epoch_of(self._order(number).row)


class RowParts(torch.utils.data.Dataset[PackedBatch]):
    """Dataset whose items are parts of rows, by RowPart.

    Args:
        rows: The PackedRows.
    """

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: RowPart) -> PackedBatch:
        found: PackedBatch = self._rows.part(*index)
        return found


def refuse_stages(stages: LengthStages | None) -> None:
    """Raises ValueError if there are stages, for rows whose number is not known."""
    require(
        stages is None,
        "data must have rows of a known number for LengthSchedule, got an endless stream. Set "
        "data.streaming=false, or train each length as a run of its own.",
    )


def training_stream(
    rows: Any, order: TrainingOrder, rank: int, stages: LengthStages | None, max_tokens: int
) -> tuple[Any, RowStream]:
    """Returns the dataset and the sampler of one rank's training batches.

    Args:
        rows: The PackedRows.
        order: Order of the rows.
        rank: Number of the rank.
        stages: Lengths by optimizer step; None reads whole rows.
        max_tokens: Capacity of a row in tokens.
    """
    options: dict[str, Any] = {
        "epoch_rows": lambda epoch: order.rows(epoch)[:, rank],
        "steps": order.steps,
        "endless": True,
    }
    if stages is None:
        return rows, RowStream(**options)
    batches = min(order.accumulated, order.steps)  # of an optimizer step
    return RowParts(rows), PartStream(PartOrder(stages, max_tokens, batches), **options)
