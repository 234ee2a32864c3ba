"""Prepares data that the user passes as Python objects: texts, token ids, or packed rows."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from lctrain.config import DataSettings
from lctrain.data.collator import PackedRows
from lctrain.data.dataset import DatasetTokens, pack, pack_tokens
from lctrain.data.faults import shared_message, warn_first_rank
from lctrain.data.mix import placed
from lctrain.data.packing import Overlong, plan_rows
from lctrain.data.prepared import OWN_SET, PreparedData
from lctrain.data.sources import Source

if TYPE_CHECKING:
    from datasets import Dataset

TEXT = "text"


@dataclass(frozen=True, kw_only=True)
class DatasetSource(Source):
    """Source of the texts in a dataset object.

    Attributes:
        dataset: A `datasets.Dataset` with the column "text" and, optionally, "name"; or a list of
            texts, or of mappings with these keys.
        held_out: Documents to hold out, in the same form as `dataset`. None holds out a part of
            `dataset`.
    """

    dataset: Any = field(repr=False)
    held_out: Any = field(default=None, repr=False)

    def load(self, cache_dir: Path) -> Dataset:
        """Returns the texts to train on: see Source."""
        return _texts(self.dataset)

    def load_held_out(self, cache_dir: Path) -> Dataset | None:
        """Returns the texts to hold out, or None: see Source."""
        return None if self.held_out is None else _texts(self.held_out)


@dataclass(frozen=True, kw_only=True)
class TokenPreparation:
    """Splits documents of token ids into training and held-out documents, and packs them into rows.

    Attributes:
        dataset: Documents of token ids, or rows that `lctrain.data.pack` returned.
        held_out: Documents or rows to hold out, in the same form as `dataset`. With None, the share
            settings.held_out_fraction of the documents in `dataset` is held out; if `dataset` is
            rows, nothing is.
        held_out_sets: Documents or rows of further held-out sets, by name.
        tokenizer: Tokenizer that made the token ids, or its name; None if it is unknown.
        settings: Settings of the data module. passkey_fraction and special_tokens must keep their
            defaults: they apply to texts.
    """

    dataset: Any
    held_out: Any
    tokenizer: Any
    settings: DataSettings
    held_out_sets: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        passkeys, special_tokens = self.settings.passkey_fraction, self.settings.special_tokens
        if passkeys or special_tokens != "text":
            raise ValueError(
                "passkey_fraction and special_tokens must be left out for token ids, got "
                f"{passkeys} and {special_tokens!r}. Pass the texts instead."
            )

    def run(self) -> PreparedData:
        """Splits and packs the documents.

        Raises:
            ValueError: if a document has no token ids, or if the documents fill no row.
        """
        train, held_out = self.dataset, self.held_out
        trained: np.ndarray | None = None
        if isinstance(train, PackedRows):
            rows, documents = train, _fingerprint_rows(train)
        else:
            tokens = DatasetTokens(train)
            digests = _digests(tokens)
            kept = np.ones(len(tokens), dtype=bool)
            if held_out is None and self.settings.held_out_fraction > 0 and len(tokens) > 1:
                kept = _kept(digests, self.settings.held_out_fraction)
                held_out = tokens.select(np.flatnonzero(~kept))
            rows = self._pack(tokens.select(np.flatnonzero(kept)))
            trained = digests[kept]
            documents = hashlib.sha256(digests[kept].tobytes()).hexdigest()[:16]
        settings = {
            "source": type(self.dataset).__name__,
            "training_documents": documents,
            "max_tokens": rows.report.max_tokens,
            "max_document_tokens": self.settings.max_document_tokens,
            "overlong": self.settings.overlong,
            "packing_window": self.settings.packing_window,
        }
        _warn_of_trained(held_out, trained, "")
        sets = {OWN_SET: self._held_out_rows(held_out)}
        for name, documents in self.held_out_sets.items():
            with placed(f"held_out[{name!r}]"):
                sets[name] = self._held_out_rows(documents)
                _warn_of_trained(documents, trained, f"The held-out set {name}: ")
        return PreparedData(self.tokenizer, rows, sets, settings)

    def _held_out_rows(self, held_out: Any) -> PackedRows:
        if isinstance(held_out, PackedRows):
            return held_out
        if held_out is None or len(held_out) == 0:
            empty = np.array([], dtype=np.int64)
            return PackedRows(DatasetTokens([]), plan_rows(empty, self.settings.max_tokens))
        return self._pack(held_out)

    def _pack(self, documents: Any) -> PackedRows:
        make = pack_tokens if isinstance(documents, DatasetTokens) else pack
        return make(
            documents,
            self.settings.max_tokens,
            max_document_tokens=self.settings.max_document_tokens,
            overlong=cast(Overlong, self.settings.overlong),
            window=self.settings.packing_window,
        )


def holds_texts(dataset: Any) -> bool:
    """Whether a dataset holds texts: its rows are strings, or have "text" and no "input_ids"."""
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
    """Returns the hash of every document's token ids: [N] uint64."""
    found = (
        hashlib.blake2b(tokens.tokens(index).astype("<i8").tobytes(), digest_size=8).digest()
        for index in range(len(tokens))
    )
    return np.array([int.from_bytes(digest, "little") for digest in found], dtype=np.uint64)


def _warn_of_trained(held_out: Any, trained: np.ndarray | None, place: str) -> None:
    """Warns if held-out documents are also in the training data. Packed rows are not compared.

    Args:
        held_out: Documents of token ids; rows or None are not compared.
        trained: [N] uint64, hashes of the training documents; None for rows.
        place: Text before the message.
    """
    if trained is None or held_out is None or isinstance(held_out, PackedRows):
        return
    tokens = held_out if isinstance(held_out, DatasetTokens) else DatasetTokens(held_out)
    shared = int(np.isin(_digests(tokens), trained).sum())
    if shared:
        warn_first_rank(shared_message(shared, len(tokens), place))


def _kept(digests: np.ndarray, held_out_fraction: float) -> np.ndarray:
    """Returns whether each document is kept for training, [N] bool; the rest is held out.

    The documents with the smallest hashes are held out: the given fraction of the distinct hashes.
    """
    distinct = np.unique(digests)
    count = min(max(1, round(held_out_fraction * len(distinct))), len(distinct) - 1)
    return digests >= distinct[count]


def _fingerprint_rows(rows: PackedRows) -> str:
    """Returns a hash of the packing plan; it identifies the rows without reading their tokens."""
    plan = rows.plan
    parts = (plan.documents, plan.starts, plan.lengths, plan.row_offsets, plan.row_pieces)
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()[:16]
