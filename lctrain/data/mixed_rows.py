"""Packs the documents of several sources into rows, in the shares that a mix sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lctrain.data.collator import PackedRows
from lctrain.data.packing import PackingReport, SourceCounts, document_limit, plan_rows

LARGEST_PASS = 10**9
"""Most documents of one pass over a mix, each counted as often as it is read."""
_ORDER = 0x6D69780  # stream of random numbers that choose documents for a part of a pass


@dataclass(frozen=True, eq=False)
class MixedPart:
    """Tokenized documents of one source of a mix.

    Attributes:
        name: Name of the source.
        store: Tokens of N documents; see `lctrain.data.documents.StoredTokens`. It may have the
            methods `labels` and `count_trained` of a ChatStore.
        overlong: Treatment of a document that is too long: "split", "truncate" or "drop".
        epochs: Times that every document is read in a pass. With weights it is a limit.
        weight: Share of the tokens, relative to the other weights. Either all parts have a weight,
            or it is None in all parts.
    """

    name: str
    store: Any
    overlong: str
    epochs: float = 1.0
    weight: float | None = None


def repeats_of(
    tokens: Sequence[int], epochs: Sequence[float], weights: Sequence[float] | None
) -> list[float]:
    """Returns how many times every source is read in one pass over a mix.

    With weights, the numbers are the largest for which the tokens of the pass have the shares of
    the weights and no number exceeds its limit in `epochs`.

    Args:
        tokens: Number of tokens of each source, at least 1.
        epochs: Times that each source is read; with weights, at most.
        weights: Shares of the tokens; None reads every source `epochs` times.
    """
    if weights is None:
        return list(epochs)
    rows = list(zip(tokens, epochs, weights, strict=True))
    scale = min(most * size / weight for size, most, weight in rows)
    return [scale * weight / size for size, _, weight in rows]


def mix_rows(
    parts: Sequence[MixedPart],
    *,
    max_tokens: int,
    max_document_tokens: int | None,
    window: int,
    seed: int,
    progress: bool = False,
) -> PackedRows:
    """Packs the documents of several sources together.

    The result depends on the documents and the arguments only. If a pass reads only a part of a
    source, the part consists of the same documents in every pass.

    Args:
        parts: The sources. Each has a document.
        max_tokens: Capacity of a row in tokens.
        max_document_tokens: Longest document in a row, in tokens; None for max_tokens.
        window: Number of documents that are packed together.
        seed: Seed by which documents are chosen for a part of a pass.
        progress: Whether to show a progress bar.

    Returns:
        The rows. Their report has the counts of every source.

    Raises:
        ValueError: if a source has no document that can be used, or a pass reads more than
            LARGEST_PASS documents.
    """
    limit = document_limit(max_document_tokens, max_tokens)
    usable = [_usable(part, limit) for part in parts]
    for part, (documents, _) in zip(parts, usable, strict=True):
        if len(documents) == 0:
            raise ValueError(
                f"sources must each hold a document that can be used, got none from {part.name}. "
                "Check its files, or its overlong, or leave it out."
            )
    weights = [part.weight for part in parts if part.weight is not None]
    repeats = repeats_of(
        [int(lengths.sum()) for _, lengths in usable],
        [part.epochs for part in parts],
        weights or None,
    )
    read = sum(len(found) * times for (found, _), times in zip(usable, repeats, strict=True))
    if read > LARGEST_PASS:
        raise ValueError(
            f"sources must give a pass of at most {LARGEST_PASS:,} documents, got {read:,.0f}. "
            "Lower epochs; trainer.max_epochs repeats the pass."
        )
    chosen = [
        _repeat(lengths, times, np.random.default_rng([_ORDER, seed, number]))
        for number, ((_, lengths), times) in enumerate(zip(usable, repeats, strict=True))
    ]
    picked = [
        (documents[rows], lengths[rows])
        for (documents, lengths), rows in zip(usable, chosen, strict=True)
    ]
    store = MixedStore([part.store for part in parts], *_interleave(picked))
    plan = plan_rows(
        store.lengths,
        max_tokens,
        max_document_tokens=max_document_tokens,
        window=window,
        progress=progress,
        count_trained=store.count_trained if store.has_labels else None,
    )
    sources = tuple(_count(plan, store, parts, repeats))
    report = replace(_with_lost(plan.report, parts, store, limit), sources=sources)
    return PackedRows(store, replace(plan, report=report))


class MixedStore:
    """A sequence of documents from several stores, with repetitions; used like a TokenStore.

    Attributes:
        lengths: [M] int64, number of tokens of each document that are used.
        names: [M] names of the documents.
        sources: [M] int64, number of the store of each document.
        has_labels: Whether any store has labels. In the other stores every token is trained on.
    """

    def __init__(
        self,
        stores: Sequence[Any],
        sources: np.ndarray,
        documents: np.ndarray,
        lengths: np.ndarray,
    ) -> None:
        """Stores the order of the documents.

        Args:
            stores: The stores.
            sources: [M] int64, store of each document.
            documents: [M] int64, number of each document in its store.
            lengths: [M] int64, tokens of each document that are used, from the first one on.
        """
        self._stores = tuple(stores)
        self.sources, self._documents, self.lengths = sources, documents, lengths
        pairs = zip(self.sources.tolist(), self._documents.tolist(), strict=True)
        self.names: Sequence[str] = [stores[source].names[number] for source, number in pairs]
        self.has_labels = any(getattr(store, "has_labels", False) for store in stores)

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens(self, document: int, start: int = 0, length: int | None = None) -> np.ndarray:
        """Returns tokens [start, start + length) of a document: [length] integers."""
        store, number, length = self._place(document, start, length)
        tokens: np.ndarray = store.tokens(number, start, length)
        return tokens

    def labels(self, document: int, start: int = 0, length: int | None = None) -> np.ndarray:
        """Returns the labels of tokens [start, start + length) of a document: [length] integers."""
        store, number, length = self._place(document, start, length)
        read = store.labels if getattr(store, "has_labels", False) else store.tokens
        labels: np.ndarray = read(number, start, length)
        return labels

    def document_numbers(self, source: int) -> np.ndarray:
        """Returns the documents of one store that are used, as numbers in that store: [m] int64."""
        return self._documents[self.sources == source]

    def count_trained(
        self, documents: np.ndarray, starts: np.ndarray, lengths: np.ndarray
    ) -> np.ndarray:
        """Returns the number of trained tokens in pieces of documents: [P] int64.

        The first token of a piece does not count: nothing predicts it.

        Args:
            documents: [P] integers, the document of each piece.
            starts: [P] integers, first token of each piece.
            lengths: [P] integers, number of tokens of each piece.
        """
        found = lengths - 1
        for source, store in enumerate(self._stores):
            own = self.sources[documents] == source
            if getattr(store, "has_labels", False) and own.any():
                numbers = self._documents[documents[own]]
                found[own] = store.count_trained(numbers, starts[own], lengths[own])
        return found

    def _place(self, document: int, start: int, length: int | None) -> tuple[Any, int, int]:
        """Returns the store of a document, its number there, and the tokens to read."""
        length = int(self.lengths[document]) - start if length is None else length
        return self._stores[self.sources[document]], int(self._documents[document]), length


def _usable(part: MixedPart, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns which documents of a source are used, and how many tokens of each: [n] int64 each."""
    lengths = np.asarray(part.store.lengths, np.int64)
    documents = np.arange(len(lengths))
    if part.overlong == "drop":
        documents = documents[lengths <= limit]
    used = lengths[documents]
    return documents, np.minimum(used, limit) if part.overlong == "truncate" else used


def _repeat(lengths: np.ndarray, times: float, random: np.random.Generator) -> np.ndarray:
    """Returns the numbers of the documents of one pass over a source, at least one.

    With times = 2.5, these are all documents, all documents again, and then documents with about
    half of the tokens, in rising order.

    Args:
        lengths: [n] int64, tokens of each document.
        times: Times that the source is read, above 0.
        random: Generator that chooses documents for the fraction.
    """
    copies = int(times)
    whole = np.tile(np.arange(len(lengths)), copies)
    order = random.permutation(len(lengths))
    ends = np.cumsum(lengths[order])
    middles = ends - lengths[order] / 2  # so that the tokens are nearest to the part
    part = order[middles <= (times - copies) * ends[-1]]
    if copies == 0 and len(part) == 0:
        part = order[:1]
    return np.concatenate([whole, np.sort(part)])


def _interleave(
    picked: Sequence[tuple[np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Joins the documents of all sources into one sequence, each source spread evenly over it.

    Args:
        picked: For each source, the numbers and the lengths of its documents: [m] int64 each.

    Returns:
        For every document of the sequence, its source, its number in the source, and its length:
        [M] int64 each.
    """
    counts = [len(numbers) for numbers, _ in picked]
    order = np.argsort(
        np.concatenate([(np.arange(count) + 0.5) / count for count in counts]), kind="stable"
    )
    sources = np.repeat(np.arange(len(picked)), counts)
    numbers = np.concatenate([numbers for numbers, _ in picked])
    lengths = np.concatenate([lengths for _, lengths in picked])
    return sources[order], numbers[order], lengths[order]


def _count(
    plan: Any, store: MixedStore, parts: Sequence[MixedPart], repeats: Sequence[float]
) -> list[SourceCounts]:
    """Returns the counts of every source in the rows."""
    sources = store.sources[plan.documents]
    capacity = max(1, plan.report.rows * plan.report.max_tokens)
    found = []
    for number, (part, times) in enumerate(zip(parts, repeats, strict=True)):
        own = sources == number
        tokens = int(plan.lengths[own].sum())
        trained = None
        if getattr(part.store, "has_labels", False):
            pieces = (plan.documents[own], plan.starts[own], plan.lengths[own])
            trained = int(store.count_trained(*pieces).sum())
        documents = len(np.unique(plan.documents[own]))
        found.append(SourceCounts(part.name, documents, tokens, tokens / capacity, times, trained))
    return found


def _with_lost(
    report: PackingReport, parts: Sequence[MixedPart], store: MixedStore, limit: int
) -> PackingReport:
    """Returns the report with the numbers of documents that were truncated, dropped or faulty."""
    truncated, dropped = [], []
    for number, part in enumerate(parts):
        lengths = np.asarray(part.store.lengths, np.int64)
        if part.overlong == "truncate":
            truncated += lengths[store.document_numbers(number)].tolist()
        elif part.overlong == "drop":
            dropped += lengths.tolist()
    truncated, dropped = ([n for n in found if n > limit] for found in (truncated, dropped))
    special = sum(getattr(part.store, "special_texts", 0) for part in parts)
    return replace(
        report,
        truncated=len(truncated),
        truncated_tokens=sum(truncated) - limit * len(truncated),
        dropped=len(dropped),
        dropped_tokens=sum(dropped),
        special_texts=special,
    )
