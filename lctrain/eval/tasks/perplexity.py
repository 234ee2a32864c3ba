"""The task perplexity: the loss of the same tokens with contexts of different lengths."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from lctrain.eval.begin import NO_BEGIN, BeginTokens, begin_tokens
from lctrain.eval.comparison import MethodComparison
from lctrain.eval.extension import trained_window
from lctrain.eval.interval import bootstrap_interval
from lctrain.eval.limits import check_model
from lctrain.eval.longest import longest_documents
from lctrain.eval.ratio import token_mean
from lctrain.eval.reader import Reader
from lctrain.eval.records import Item, Measure, Result, Subject
from lctrain.eval.row import PerplexityRow
from lctrain.eval.runner import score_windows
from lctrain.eval.shared_work import summed
from lctrain.eval.table import PerplexityTable
from lctrain.eval.task import Task
from lctrain.eval.windows import Windows, cut_windows
from lctrain.limits import MIN_TOKENS, check_windows
from lctrain.pluralize import pluralize

if TYPE_CHECKING:
    from lctrain.config import EvalConfig
    from lctrain.data import TokenizedDocument


class Perplexity(Task):
    """The loss of documents, of the same tokens at every length. Its items are documents.

    Args:
        overlap: Fraction of a window that is context and not scored, in [0, 1).
        stride: Number of positions that a window scores; None for `(1 - overlap) * length`, or,
            with methods, half of the shortest length.
        min_context: Smallest number of preceding tokens of a scored token; None for 1, or, with
            methods, the longest length - stride + 1.
        begin: Begin tokens of the windows, or the option of `begin_tokens`.
        documents: Number of documents, the longest first; None for all.
        document_tokens: Number of tokens to read of each document; None for all.
        by_method: Whether methods of reading beyond the window are compared.
    """

    measures: ClassVar = (Measure("loss", "Loss (nats per token)", larger_is_better=False),)
    name = "perplexity"
    title: ClassVar = "Perplexity"
    unit: ClassVar = "token"
    shares_itself: ClassVar = True

    def __init__(
        self,
        *,
        overlap: float = 0.5,
        stride: int | None = None,
        min_context: int | None = 1,
        begin: BeginTokens | bool | None = NO_BEGIN,
        documents: int | None = None,
        document_tokens: int | None = None,
        by_method: bool = False,
    ) -> None:
        self.overlap = overlap
        self.stride = stride
        self.min_context = min_context
        self.begin = begin
        self.documents = documents
        self.document_tokens = document_tokens
        self.by_method = by_method

    @classmethod
    def of(cls, config: EvalConfig) -> Perplexity:
        """Returns the task with the settings of an evaluation."""
        return cls(
            overlap=config.overlap,
            stride=config.stride,
            min_context=config.min_context,
            begin=config.begin_token,
            documents=config.documents,
            document_tokens=config.document_tokens,
            by_method=bool(config.methods),
        )

    def prepare(self, subject: Subject, lengths: tuple[int, ...]) -> None:
        """Chooses the scored tokens: see Task.

        Raises:
            ValueError: if a setting is out of range, no token can be scored, or the model does not
                support the tokens or lengths.
        """
        super().prepare(subject, lengths)
        begin = self.begin
        if not isinstance(begin, BeginTokens):
            known = subject.tokenizer is not None
            begin = begin_tokens(subject.tokenizer, begin) if known else NO_BEGIN
        self._begin = begin
        self._stride, min_context = self.stride, self.min_context
        if self.by_method:
            self._stride = max(1, lengths[0] // 2) if self.stride is None else self.stride
            if min_context is None:
                min_context = max(1, lengths[-1] - self._stride + 1)
        self._min_context = 1 if min_context is None else min_context
        check_windows(self.overlap, self._min_context, self._stride, lengths[0])
        self._prefix = begin.tokens if begin.every_window else ()
        if lengths[0] < len(self._prefix) + MIN_TOKENS:
            raise ValueError(
                f"lengths must be at least {len(self._prefix) + MIN_TOKENS} with "
                f"{pluralize(len(self._prefix), 'begin token')}, "
                f"got {lengths[0]}. Leave it out, or set begin_token=false."
            )
        chosen = subject.documents
        if self.documents is not None or self.document_tokens is not None:
            chosen = longest_documents(chosen, self.documents, self.document_tokens)
        scored = _scorable(chosen, self._min_context, self._prefix)
        self._names, self._tokens, self._counts = scored
        self._longest = max(map(len, self._tokens)) - 1
        check_model(subject.model, self._tokens, min(lengths[-1], self._longest))

    def make(self, length: int) -> Sequence[Windows]:
        """Returns the windows of one length: see Task."""
        return [
            cut_windows(
                [len(ids) for ids in self._tokens],
                length,
                overlap=self.overlap,
                stride=self._stride,
                min_context=self._min_context,
                begin=len(self._prefix),
            )
        ]

    def score(self, reader: Reader, length: int, made: Sequence[Any]) -> Iterator[Item]:
        """Yields the loss of every document: see Task."""
        (windows,) = made
        sums = np.zeros(len(self._tokens))
        for scored in score_windows(
            reader.model,
            self._tokens,
            windows,
            max_tokens=reader.max_tokens,
            device=reader.device,
            segment=reader.segment,
            begin=self._prefix,
            ranks=reader.ranks,
        ):
            sums += np.bincount(scored.documents, scored.losses, len(sums))
            reader.advance(len(scored.losses) * reader.ranks.data_size)  # of all ranks, about
        sums = summed(sums, reader.ranks)
        for name, loss, count in zip(self._names, sums.tolist(), self._counts, strict=True):
            yield Item(name, {"loss": loss}, float(count))

    def size(self, length: int) -> int:
        """Returns the number of scored tokens: see Task."""
        return int(self._counts.sum())

    def work(self, length: int) -> float:
        """Returns the tokens of all windows: see Task."""
        (windows,) = self.make(length)
        return float(windows.lengths.sum())

    def facts(self, length: int) -> dict[str, float]:
        """Returns numbers of the windows: see Task."""
        (windows,) = self.make(length)
        return {
            "mean_context": windows.mean_context(),
            "windows": len(windows),
            "begun": _count_begun(self._tokens, windows, self._begin.tokens),
        }

    def same_as(self, length: int) -> int:
        """Returns the longest document for longer lengths, which give the same windows."""
        return min(length, self._longest)

    def table(
        self, results: Mapping[str, Mapping[int, Result]]
    ) -> PerplexityTable | MethodComparison:
        """Returns a table by length, or by method and length: see Task."""
        if list(results) == [""]:
            return self.by_length(results[""], self.subject.name)
        tables = {method: self.by_length(found, method) for method, found in results.items()}
        return MethodComparison(
            tables, trained_window(self.subject.model, self.subject.window), self.subject.name
        )

    def by_length(self, results: Mapping[int, Result], name: str) -> PerplexityTable:
        """Returns the table of one method.

        Args:
            results: Results by rising length.
            name: Name of the model or the method.
        """
        first = _losses(next(iter(results.values())))
        return PerplexityTable(
            tuple(
                _row(length, result, first, self._min_context) for length, result in results.items()
            ),
            name=name,
            overlap=self.overlap,
            min_context=self._min_context,
            stride=self._stride,
            begin_tokens=self._begin.tokens,
        )


def _scorable(
    documents: Sequence[TokenizedDocument], min_context: int, begin: Sequence[int]
) -> tuple[list[str], list[np.ndarray], np.ndarray]:
    """Returns the documents that have tokens to score, and the number of scored tokens in each.

    Args:
        documents: Tokenized documents.
        min_context: Smallest number of preceding tokens of a scored token.
        begin: Begin tokens, which are added to documents that do not begin with them.

    Returns:
        Names of the kept documents with their number, token ids of each, [n] int64, and the counts,
        [documents] int64.
    """
    tokens = [np.asarray(document.input_ids, dtype=np.int64) for document in documents]
    prefix = np.array(begin, dtype=np.int64)
    tokens = [ids if _begins(ids, begin) else np.concatenate([prefix, ids]) for ids in tokens]
    kept = [ids for ids in tokens if len(ids) > min_context]
    if not kept:
        longest = f", the longest of {pluralize(max(map(len, tokens)), 'token')}" if tokens else ""
        raise ValueError(
            f"documents must hold one of more than {pluralize(min_context, 'token')}, got "
            f"{len(tokens)}{longest}"
            ". Hold out more or longer documents, or lower min_context."
        )
    names = [
        f"{number} {document.name}"
        for number, (document, ids) in enumerate(zip(documents, tokens, strict=True))
        if len(ids) > min_context
    ]
    return names, kept, np.array([len(ids) - min_context for ids in kept], dtype=np.int64)


def _begins(ids: np.ndarray, begin: Sequence[int]) -> bool:
    return ids[: len(begin)].tolist() == list(begin)


def _count_begun(tokens: Sequence[np.ndarray], windows: Windows, begin: Sequence[int]) -> int:
    """Returns the number of windows that begin with the begin tokens."""
    if not begin:
        return 0
    whole = np.array([_begins(ids, begin) for ids in tokens])[windows.documents]
    return int(((windows.prefixes > 0) | (whole & (windows.starts == 0))).sum())


def _losses(result: Result) -> np.ndarray:
    return np.array([item.totals["loss"] for item in result.items])


def _row(length: int, result: Result, shortest: np.ndarray, min_context: int) -> PerplexityRow:
    sums = _losses(result)
    counts = np.array([int(item.weight) for item in result.items])
    loss, stderr = token_mean(sums, counts)
    gain, gain_stderr = token_mean(shortest - sums, counts)
    with np.errstate(over="ignore"):
        perplexity, low, high = np.exp([loss, loss - stderr, loss + stderr]).tolist()
        interval = np.exp(bootstrap_interval(sums, counts)).tolist()
    return PerplexityRow(
        length=length,
        perplexity=perplexity,
        perplexity_low=low,
        perplexity_high=high,
        loss=loss,
        stderr=stderr,
        gain=gain,
        gain_stderr=gain_stderr,
        mean_context=result.facts["mean_context"],
        documents=len(counts),
        tokens=int(counts.sum()),
        windows=int(result.facts["windows"]),
        begun=int(result.facts["begun"]),
        interval_low=interval[0],
        interval_high=interval[1],
        short_documents=int((counts + min_context < length).sum()),
    )
