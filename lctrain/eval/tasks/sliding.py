"""The task sliding_perplexity: perplexity as papers on longer contexts report it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from lctrain.eval.limits import check_model
from lctrain.eval.longest import longest_documents
from lctrain.eval.reader import Reader
from lctrain.eval.records import Item, Measure, Subject
from lctrain.eval.runner import score_windows
from lctrain.eval.shared_work import summed
from lctrain.eval.task import Task
from lctrain.eval.windows import Windows
from lctrain.limits import require
from lctrain.pluralize import pluralize
from lctrain.warn import warn_once

if TYPE_CHECKING:
    from lctrain.config import EvalConfig

STRIDE = 256  # that of the papers

log = logging.getLogger(__name__)


class SlidingPerplexity(Task):
    """Perplexity by the protocol of position interpolation and YaRN (arXiv 2309.00071).

    Of each document the first `length` tokens are read, in windows of `length` tokens that move by
    256. Each window scores its new tokens, and the result is the mean over windows of their mean
    losses. Documents shorter than a length are left out and counted. Different lengths score
    different tokens, so the task `perplexity` is the one that shows what context is worth.

    Args:
        stride: Tokens by which a window moves.
        documents: Number of documents, the longest first; None for all.
        document_tokens: Number of tokens to read of each document; None for the length.
    """

    name = "sliding_perplexity"
    measures: ClassVar = (
        Measure("loss", "Sliding perplexity", larger_is_better=False, exponential="perplexity"),
    )
    title: ClassVar = "Sliding perplexity"
    unit: ClassVar = "window"
    shares_itself: ClassVar = True

    def __init__(
        self,
        *,
        stride: int = STRIDE,
        documents: int | None = None,
        document_tokens: int | None = None,
    ) -> None:
        require(stride >= 1, f"stride must be at least 1, got {stride}. Papers take 256.")
        self.stride = stride
        self.documents = documents
        self.document_tokens = document_tokens

    @classmethod
    def of(cls, config: EvalConfig) -> SlidingPerplexity:
        """Returns the task with the settings of an evaluation."""
        return cls(documents=config.documents, document_tokens=config.document_tokens)

    def prepare(self, subject: Subject, lengths: tuple[int, ...]) -> None:
        """Checks that a document has as many tokens as the longest length: see Task.

        Raises:
            ValueError: if none has, or the model does not support the tokens or lengths.
        """
        super().prepare(subject, lengths)
        require(
            (self.document_tokens or lengths[-1]) >= lengths[-1],
            f"document_tokens must be at least the longest length, {lengths[-1]}, for {self.name}, "
            f"got {self.document_tokens}. Raise it, or leave that length out.",
        )
        chosen = longest_documents(subject.documents, self.documents)
        self._tokens = [np.asarray(d.input_ids, dtype=np.int64) for d in chosen]
        self._names = [f"{number} {document.name}" for number, document in enumerate(chosen)]
        longest = max(map(len, self._tokens), default=0)
        if longest < lengths[-1]:
            raise ValueError(
                f"documents must hold one of at least {lengths[-1]} tokens for {self.name}, got "
                f"{pluralize(len(chosen), 'document')} of at most {longest}. Use longer documents, "
                "or leave that length out."
            )
        check_model(subject.model, self._tokens, lengths[-1])

    def make(self, length: int) -> Sequence[Windows]:
        """Returns the windows of the documents that are long enough: see Task."""
        rows: list[tuple[int, int, int, int]] = []
        for number, ids in enumerate(self._tokens):
            if len(ids) < length:
                continue
            total = min(len(ids), self.document_tokens or length)
            begun = 0
            for start in range(0, total, self.stride):
                stop = min(start + length, total)
                rows.append((number, start, max(0, begun - 1), stop - 1))
                begun = stop
                if stop == total:
                    break
        documents, starts, scored_from, stops = np.array(rows, dtype=np.int64).T
        return [Windows(documents, starts, scored_from, stops, np.zeros_like(starts))]

    def score(self, reader: Reader, length: int, made: Sequence[Any]) -> Iterator[Item]:
        """Yields the mean loss of every window: see Task."""
        (windows,) = made
        sums = np.zeros(len(windows))
        first = {int(d): int(np.argmax(windows.documents == d)) for d in set(windows.documents)}
        for scored in score_windows(
            reader.model,
            self._tokens,
            windows,
            max_tokens=reader.max_tokens,
            device=reader.device,
            segment=reader.segment,
            ranks=reader.ranks,
        ):
            for document in set(scored.documents.tolist()):
                mine = scored.documents == document
                begin = first[document]
                bounds = windows.scored_from[windows.documents == document]
                places = np.searchsorted(bounds, scored.positions[mine], side="right") - 1
                sums += np.bincount(begin + places, scored.losses[mine], len(sums))
            reader.advance(len(scored.losses))
        sums = summed(sums, reader.ranks)
        counts: dict[int, int] = {}
        for document, mean in zip(windows.documents.tolist(), sums / windows.scored, strict=True):
            number = counts[document] = counts.get(document, -1) + 1
            yield Item(f"{self._names[document]} window {number}", {"loss": float(mean)})

    def size(self, length: int) -> int:
        """Returns the number of scored tokens: see Task."""
        (windows,) = self.make(length)
        return int(windows.scored.sum())

    def work(self, length: int) -> float:
        """Returns the tokens of all windows: see Task."""
        (windows,) = self.make(length)
        return float(windows.lengths.sum())

    def facts(self, length: int) -> dict[str, float]:
        """Returns the numbers of documents: see Task."""
        short = sum(len(ids) < length for ids in self._tokens)
        if short:
            warn_once(
                log,
                "%s leaves out %s of fewer than %s tokens.",
                self.name,
                pluralize(short, "document"),
                f"{length:,}",
            )
        return {"documents": len(self._tokens) - short, "short_documents": short}
