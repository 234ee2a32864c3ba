"""Datasets that the user hands over as objects: texts, token ids, or rows that are packed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lctrain.batch import check_max_tokens
from lctrain.data.collator import PackedRows
from lctrain.data.dataset import DatasetTokens, pack, pack_tokens
from lctrain.data.packing import Overlong, document_limit, plan_rows
from lctrain.data.prepare import PreparedData
from lctrain.data.sources import Source

if TYPE_CHECKING:
    from datasets import Dataset

TEXT = "text"


@dataclass(frozen=True, kw_only=True)
class DatasetSource(Source):
    """Texts of a dataset in memory.

    Attributes:
        dataset: A `datasets.Dataset` with the column "text", and perhaps "name".
        held_out: The same, to hold out; None holds some documents of `dataset` out.
    """

    dataset: Any = field(repr=False)
    held_out: Any = field(default=None, repr=False)

    def load(self, cache_dir: Path) -> Dataset:
        """See Source."""
        return _texts(self.dataset)

    def load_held_out(self, cache_dir: Path) -> Dataset | None:
        """See Source."""
        return None if self.held_out is None else _texts(self.held_out)


@dataclass(frozen=True, kw_only=True)
class TokenPreparation:
    """How documents of token ids become rows. The fields are those of PackedDataModule."""

    dataset: Any
    held_out: Any
    tokenizer: Any
    max_tokens: int
    max_document_tokens: int | None
    overlong: Overlong
    packing_window: int
    held_out_fraction: float

    def __post_init__(self) -> None:
        check_max_tokens(self.max_tokens)
        document_limit(self.max_document_tokens, self.max_tokens)
        if not 0 <= self.held_out_fraction < 1:
            raise ValueError(
                f"held_out_fraction must be in [0, 1), got {self.held_out_fraction}. It is a share "
                "of the documents; 0 holds none out."
            )

    def run(self) -> PreparedData:
        """Splits and packs.

        Raises:
            ValueError: if the documents have no token ids, or fill no row.
        """
        train, held_out = self.dataset, self.held_out
        if isinstance(train, PackedRows):
            rows, documents = train, _fingerprint_rows(train)
        else:
            tokens = DatasetTokens(train)
            digests = _digests(tokens)
            kept = np.ones(len(tokens), dtype=bool)
            if held_out is None and self.held_out_fraction > 0 and len(tokens) > 1:
                kept = _kept(digests, self.held_out_fraction)
                held_out = tokens.select(np.flatnonzero(~kept))
            rows = self._pack(tokens.select(np.flatnonzero(kept)))
            documents = hashlib.sha256(digests[kept].tobytes()).hexdigest()[:16]
        settings = {
            "source": type(self.dataset).__name__,
            "training_documents": documents,
            "max_tokens": rows.report.max_tokens,
            "max_document_tokens": self.max_document_tokens,
            "overlong": self.overlong,
            "packing_window": self.packing_window,
        }
        return PreparedData(self.tokenizer, rows, self._held_out_rows(held_out), settings)

    def _held_out_rows(self, held_out: Any) -> PackedRows:
        if isinstance(held_out, PackedRows):
            return held_out
        if held_out is None or len(held_out) == 0:
            empty = np.array([], dtype=np.int64)
            return PackedRows(DatasetTokens([]), plan_rows(empty, self.max_tokens))
        return self._pack(held_out)

    def _pack(self, documents: Any) -> PackedRows:
        make = pack_tokens if isinstance(documents, DatasetTokens) else pack
        return make(
            documents,
            self.max_tokens,
            max_document_tokens=self.max_document_tokens,
            overlong=self.overlong,
            window=self.packing_window,
        )


def holds_texts(dataset: Any) -> bool:
    """Whether a dataset is one of texts that nobody has tokenized."""
    columns = getattr(dataset, "column_names", None)
    if isinstance(columns, list):
        return TEXT in columns and "input_ids" not in columns
    if isinstance(dataset, (list, tuple)) and dataset:
        first = dataset[0]
        return isinstance(first, str) or (
            isinstance(first, dict) and TEXT in first and "input_ids" not in first
        )
    return False


def _texts(dataset: Any) -> Dataset:
    from datasets import Dataset

    if isinstance(dataset, (list, tuple)):
        rows = [{TEXT: row} if isinstance(row, str) else row for row in dataset]
        dataset = Dataset.from_list(rows)
    return dataset.select_columns([c for c in (TEXT, "name") if c in dataset.column_names])


def _digests(tokens: DatasetTokens) -> np.ndarray:
    """[N] uint64 hashes of the documents: the split follows from the content alone."""
    found = (
        hashlib.blake2b(tokens.tokens(index).astype("<i8").tobytes(), digest_size=8).digest()
        for index in range(len(tokens))
    )
    return np.array([int.from_bytes(digest, "little") for digest in found], dtype=np.uint64)


def _kept(digests: np.ndarray, held_out_fraction: float) -> np.ndarray:
    """[N] bool: all but a share of the distinct documents, at least one on each side."""
    distinct = np.unique(digests)
    count = min(max(1, round(held_out_fraction * len(distinct))), len(distinct) - 1)
    return digests >= distinct[count]


def _fingerprint_rows(rows: PackedRows) -> str:
    """Hash of which piece lies where; the tokens themselves are not read."""
    plan = rows.plan
    parts = (plan.documents, plan.starts, plan.lengths, plan.row_offsets, plan.row_pieces)
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()[:16]
