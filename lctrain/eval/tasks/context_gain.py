"""The task context_gain: what tokens at a distance are worth, in nats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from lctrain.eval.measure_table import MeasureTable
from lctrain.eval.records import Item, Measure, Result, Subject
from lctrain.eval.tasks.perplexity import Perplexity
from lctrain.limits import require

if TYPE_CHECKING:
    from lctrain.config import EvalConfig


class ContextGain(Perplexity):
    """The drop of the loss of the same tokens from one context length to the next.

    The row of a length tells what the tokens between the next shorter length and this one are
    worth. Every scored token has more than `length - stride` tokens of context at each length.
    """

    name = "context_gain"
    measures: ClassVar = (Measure("gain", "Gain (nats per token)"),)
    title: ClassVar = "Gain from context"

    @property
    def item_measures(self) -> tuple[Measure, ...]:
        """The loss at every length, from which the gains are computed: see Task."""
        return Perplexity.measures

    @classmethod
    def of(cls, config: EvalConfig) -> ContextGain:
        """Returns the task with the settings of an evaluation."""
        settings: dict[str, Any] = {
            "stride": config.stride,
            "min_context": config.min_context,
            "begin": config.begin_token,
            "documents": config.documents,
            "document_tokens": config.document_tokens,
        }
        return cls(**settings, by_method=True)

    def prepare(self, subject: Subject, lengths: tuple[int, ...]) -> None:
        """Checks that there are two lengths: see Task.

        Raises:
            ValueError: if there is one length only, or a document is too short (see Perplexity).
        """
        require(
            len(lengths) > 1,
            f"lengths must name at least two for context_gain, got {list(lengths)}. Add a shorter "
            "one.",
        )
        super().prepare(subject, lengths)

    def table(  # type: ignore[override]
        self, results: Mapping[str, Mapping[int, Result]]
    ) -> MeasureTable:
        """Returns the gain from each length to the next: see Task."""
        gains = {method: _gains(by_length) for method, by_length in results.items()}
        return MeasureTable.of(
            self.name, self.title, "document", self.measures, gains, self.subject
        )


def _gains(by_length: Mapping[int, Result]) -> dict[int, Result]:
    """Returns the differences of the losses of all documents, by the longer length."""
    lengths = sorted(by_length)
    found = {}
    for i in range(1, len(lengths)):
        before, after = by_length[lengths[i - 1]], by_length[lengths[i]]
        items = tuple(
            Item(a.id, {"gain": a.totals["loss"] - b.totals["loss"]}, a.weight)
            for a, b in zip(before.items, after.items, strict=True)
        )
        found[lengths[i]] = Result(items, {"compared_with": lengths[i - 1]})
    return found
