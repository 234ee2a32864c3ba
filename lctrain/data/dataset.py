"""pack: packs documents of token ids into rows of at most `max_tokens`, as a map-style dataset."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lctrain.data.collator import PackedRows
from lctrain.data.packing import Overlong, plan_rows
from lctrain.pluralize import pluralize

TOKENS, LABELS = "input_ids", "labels"


def pack(
    dataset: Any,
    max_tokens: int,
    *,
    max_document_tokens: int | None = None,
    overlong: Overlong = "split",
    window: int = 100_000,
) -> PackedRows:
    """Packs documents of token ids into rows of at most `max_tokens`.

    The result is a map-style dataset of PackedBatch: give it to a DataLoader with
    `batch_size=None` and `sampler=lctrain.data.RowOrder(rows)`, or to PackedDataModule.

    Args:
        dataset: A `datasets.Dataset`, another map-style dataset, or an iterable, which is read to
            its end and kept in memory. A document is a sequence of token ids, or a mapping with
            "input_ids" and, optionally, "labels" and "name". Labels are aligned with the tokens as
            in transformers, and -100 is not scored. Empty documents are dropped and counted.
        max_tokens: Capacity of a row in tokens, >= 2.
        max_document_tokens: Longest document in a row, in tokens, in [2, max_tokens]; None for
            max_tokens.
        overlong: Treatment of a document longer than max_document_tokens: "split" it into pieces,
            "truncate" it to its first tokens, or "drop" it.
        window: Number of documents that are packed together; a row holds documents of one window.

    Returns:
        The rows. Their attribute `report` holds the counts.

    Raises:
        ValueError: if there is no document, a document has no token ids, its labels are not as many
            as its tokens, or an argument is out of range; the message names the document.
    """
    return pack_tokens(
        DatasetTokens(dataset),
        max_tokens,
        max_document_tokens=max_document_tokens,
        overlong=overlong,
        window=window,
    )


def pack_tokens(
    tokens: DatasetTokens,
    max_tokens: int,
    *,
    max_document_tokens: int | None = None,
    overlong: Overlong = "split",
    window: int = 100_000,
) -> PackedRows:
    """Packs documents whose lengths have been read: see `pack` for the arguments and the errors."""
    kept = np.flatnonzero(tokens.lengths > 0)
    plan = plan_rows(
        tokens.lengths[kept],
        max_tokens,
        max_document_tokens=max_document_tokens,
        overlong=overlong,
        window=window,
        dropped_empty=len(tokens) - len(kept),
    )
    if len(plan) == 0:
        raise ValueError(
            f"dataset must fill at least one row, got none: {plan.report}. Pass documents with "
            "tokens, a larger max_tokens, or overlong='split'."
        )
    return PackedRows(tokens, replace(plan, documents=kept[plan.documents]))


class DatasetTokens:
    """Tokens, labels and names of the N documents of a dataset.

    Lengths and names are kept in memory; tokens and labels are read on access.

    Attributes:
        lengths: [N] int64, number of tokens of each document.
        names: [N] names of the documents; "document <number>" where the dataset has none.
        has_labels: Whether the documents have labels.
    """

    def __init__(self, dataset: Any) -> None:
        """Reads the lengths of all documents.

        Raises:
            ValueError: if a document has no token ids, or its labels are not as many as its tokens.
        """
        self._dataset = _indexable(dataset)
        count = len(self._dataset)
        self._places = np.arange(count)
        self.names: Sequence[str] = [f"document {index}" for index in range(count)]
        columns = getattr(self._dataset, "column_names", None)
        if isinstance(columns, list):  # a datasets.Dataset: other columns are not read
            _check_columns(columns)
            used = [name for name in (TOKENS, LABELS) if name in columns]
            if "name" in columns:
                self.names = [str(name) for name in self._dataset["name"]]
            self._dataset = self._dataset.with_format("numpy", columns=used)
            self.has_labels = LABELS in columns
            lengths = _column_lengths(self._dataset, used)
        else:
            documents = [_read(self._dataset[index], index) for index in range(count)]
            self.has_labels = any(labels is not None for _, labels in documents)
            lengths = {
                TOKENS: [len(ids) for ids, _ in documents],
                LABELS: [-1 if labels is None else len(labels) for _, labels in documents],
            }
            named = [document.get("name") for document in self._dataset if _is_mapping(document)]
            if len(named) == count and all(name is not None for name in named):
                self.names = [str(name) for name in named]
        self.lengths = np.asarray(lengths[TOKENS], dtype=np.int64)
        if self.has_labels:
            self._check_labels(np.asarray(lengths[LABELS], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.lengths)

    def select(self, documents: np.ndarray) -> DatasetTokens:
        """Returns the documents with the given numbers, [n] int64, in the order of the numbers."""
        chosen = copy.copy(self)
        chosen._places = self._places[documents]
        chosen.lengths = self.lengths[documents]
        chosen.names = [self.names[index] for index in documents]
        return chosen

    def tokens(self, document: int, start: int = 0, length: int | None = None) -> np.ndarray:
        """Returns tokens [start, start + length) of a document: [length] integers."""
        ids, _ = self._read(document)
        return ids[start : None if length is None else start + length]

    def labels(self, document: int, start: int = 0, length: int | None = None) -> np.ndarray:
        """Returns the labels of tokens [start, start + length) of a document: [length] integers.

        Labels are aligned with the tokens, not shifted.
        """
        _, labels = self._read(document)
        assert labels is not None
        return labels[start : None if length is None else start + length]

    def _read(self, document: int) -> tuple[np.ndarray, np.ndarray | None]:
        place = int(self._places[document])
        return _read(self._dataset[place], place)

    def _check_labels(self, lengths: np.ndarray) -> None:
        wrong = np.flatnonzero(lengths != self.lengths)
        if len(wrong) == 0:
            return
        first = int(wrong[0])
        got = "none" if lengths[first] < 0 else f"{lengths[first]}"
        raise ValueError(
            f"labels must have one entry per token in every document, got {got} for the "
            f"{pluralize(self.lengths[first], 'token')} of document {first}. Align them as "
            "transformers does "
            "(-100 is not scored), or leave them out everywhere."
        )


def _indexable(dataset: Any) -> Any:
    """Returns the dataset if it has a length and an index, else a list of its documents."""
    if isinstance(dataset, (str, bytes, Mapping)):
        raise ValueError(
            f"dataset must be documents of token ids, got a {type(dataset).__name__}. Pass a "
            "datasets.Dataset or a list of documents."
        )
    if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
        return dataset
    if isinstance(dataset, Iterable):
        return list(dataset)
    raise ValueError(
        f"dataset must be map-style or iterable, got {type(dataset).__name__}. Pass a "
        "datasets.Dataset or a list of documents."
    )


def _check_columns(columns: list[str]) -> None:
    if TOKENS not in columns:
        raise ValueError(
            f"dataset must have the column {TOKENS!r}, got {', '.join(map(repr, columns))}. "
            "Tokenize it first: dataset.map(lambda row: tokenizer(row['text'])); or give the texts "
            "to PackedDataModule."
        )


def _column_lengths(dataset: Any, names: list[str]) -> dict[str, list[int]]:
    import pyarrow.compute as pc

    lengths: dict[str, list[int]] = {name: [] for name in names}
    for table in dataset.with_format("arrow", columns=names).iter(batch_size=1000):
        for name in names:
            counts = pc.fill_null(pc.list_value_length(table[name]), -1 if name == LABELS else 0)
            lengths[name].extend(counts.to_pylist())
    return lengths


def _is_mapping(document: Any) -> bool:
    return isinstance(document, Mapping)


def _read(document: Any, index: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns the token ids [n] and the labels [n] of one document; None for absent labels."""
    if not _is_mapping(document):
        return _integers(document, TOKENS, index), None
    if document.get(TOKENS) is None:
        raise ValueError(
            f"a document must have {TOKENS!r}, got document {index} with "
            f"{', '.join(map(repr, document)) or 'nothing'}. Tokenize the texts first."
        )
    labels = document.get(LABELS)
    return (
        _integers(document[TOKENS], TOKENS, index),
        None if labels is None else _integers(labels, LABELS, index),
    )


def _integers(values: Any, name: str, index: int) -> np.ndarray:
    array = np.asarray(values)
    if array.size == 0:
        array = array.astype(np.int64).reshape(-1)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(
            f"{name} must be a sequence of integers, got {array.dtype} of shape {array.shape} in "
            f"document {index}. Pass the token ids of one document."
        )
    return array
