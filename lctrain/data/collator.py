"""PackCollator (a `collate_fn`) and PackedRows (a dataset): tokenized documents to PackedBatch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lctrain.batch import PackedBatch
from lctrain.batch_input import check_max_tokens
from lctrain.data.documents import StoredTokens
from lctrain.data.packing import PackingPlan, PackingReport
from lctrain.instances import require_instance


@dataclass(frozen=True)
class PackCollator:
    """Builds one PackedBatch from the documents of one row; a `collate_fn` for any DataLoader.

    A document is a mapping with "input_ids" and, optionally, "labels", "document_id" and "name".
    Labels are not shifted, as in transformers: labels[i] belongs to token i. The document id keys
    the document's attention dropout mask.

    Attributes:
        max_tokens: Largest number of tokens in a batch, >= 2; None for no limit.
        as_arguments: Whether to return a dictionary of a model's arguments, labels included, for
            `model(**batch)` and transformers' Trainer: see PackedBatch.arguments. False returns a
            PackedBatch.
    """

    max_tokens: int | None = None
    as_arguments: bool = False

    def __post_init__(self) -> None:
        check_max_tokens(self.max_tokens)

    def __call__(self, documents: Sequence[Mapping[str, Any]]) -> PackedBatch | dict[str, Any]:
        """Packs documents as `pack` does, and returns them in the form that `as_arguments` sets."""
        batch = self.pack(documents)
        return batch.arguments() if self.as_arguments else batch

    def pack(self, documents: Sequence[Mapping[str, Any]]) -> PackedBatch:
        """Packs documents into one batch, in the given order.

        Raises:
            ValueError: if a document has no "input_ids", if its "attention_mask" holds a value
                other than 1, or if PackedBatch.from_documents refuses the documents.
        """
        for index, document in enumerate(documents):
            if not isinstance(document, Mapping) or "input_ids" not in document:
                got = list(document) if isinstance(document, Mapping) else type(document).__name__
                raise ValueError(
                    f"documents must be mappings with 'input_ids', got {got} for number {index}. "
                    "Tokenize the texts first, and give the loader batch_size=."
                )
            if any(value != 1 for value in _values(document.get("attention_mask"))):
                raise ValueError(
                    f"documents must come without padding, got an attention_mask with other values "
                    f"than 1 for number {index}. Tokenize with padding=False, and make every "
                    "document a mapping of its own."
                )
        return PackedBatch.from_documents(
            [document["input_ids"] for document in documents],
            document_ids=_all_or_none(documents, "document_id"),
            names=_all_or_none(documents, "name"),
            labels=_all_or_none(documents, "labels"),
            max_tokens=self.max_tokens,
        )


def _values(mask: Any) -> list[Any]:
    return [] if mask is None else torch.as_tensor(mask).flatten().tolist()


def _all_or_none(documents: Sequence[Mapping[str, Any]], field: str) -> list[Any] | None:
    having = sum(field in document for document in documents)
    if having not in (0, len(documents)):
        raise ValueError(
            f"{field!r} must be in all documents of a row or in none, got {having} of "
            f"{len(documents)}. Add it to the others."
        )
    return [document[field] for document in documents] if having else None


class PackedRows(torch.utils.data.Dataset[PackedBatch]):
    """Map-style dataset of the rows of a packing plan; an item is a PackedBatch.

    Index ~r (the negative number -r - 1) returns row r with every label -100, so that the row adds
    nothing to the loss. In the last step, a rank for which no row is left reads such a row.
    """

    def __init__(self, store: StoredTokens, plan: PackingPlan) -> None:
        """Wraps tokenized documents and the plan that packs them.

        Args:
            store: Tokens of the documents. If its attribute `has_labels` is true, its method
                `labels` returns the labels; otherwise the tokens themselves are the labels.
            plan: Plan of the packing: which pieces of documents each row holds.
        """
        require_instance("plan", plan, PackingPlan, "Call lctrain.data.pack instead.")
        self.store: Any = store
        self.plan = plan
        self.collate = PackCollator(plan.report.max_tokens).pack

    @property
    def report(self) -> PackingReport:
        """Counts of rows, documents and tokens of the packing."""
        return self.plan.report

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> PackedBatch:
        row = index if index >= 0 else ~index
        if row >= len(self):
            raise IndexError(f"row {row} of {len(self)}")
        batch = self.collate([self._document(int(piece)) for piece in self.plan.row(row)])
        return batch if index >= 0 else batch.without_targets()

    def part(self, row: int, part: int, parts: int) -> PackedBatch:
        """Returns one of several equal parts of a row.

        Parts differ by at most one token. A part of a row with fewer tokens than parts may hold one
        token, without a target.

        Args:
            row: Number of the row.
            part: Number of the part, from 0.
            parts: Number of parts of the row.
        """
        pieces = self.plan.row(row)
        ends = np.cumsum(self.plan.lengths[pieces])
        begin, end = (int(ends[-1]) * number // parts for number in (part, part + 1))
        end = max(end, begin + 1)
        found = []
        for piece, last in zip(pieces.tolist(), ends.tolist(), strict=True):
            first = last - int(self.plan.lengths[piece])
            skipped, stop = max(begin - first, 0), min(end, last) - first
            if skipped < stop:
                found.append(self._document(piece, skipped, stop - skipped))
        return self.collate(found)

    def _document(self, piece: int, skipped: int = 0, length: int | None = None) -> dict[str, Any]:
        """Returns a piece of a document, or `length` tokens of it after the first `skipped`."""
        document = int(self.plan.documents[piece])
        start = int(self.plan.starts[piece]) + skipped
        length = int(self.plan.lengths[piece]) if length is None else length
        name = self.store.names[document]
        if length < self.store.lengths[document]:
            name = f"{name}[{start}:{start + length}]"
        packed = {
            "input_ids": self.store.tokens(document, start, length),
            "document_id": piece,
            "name": name,
        }
        if getattr(self.store, "has_labels", False):
            packed["labels"] = self.store.labels(document, start, length)
        return packed
