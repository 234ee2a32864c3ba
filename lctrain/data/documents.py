"""Documents: reading them once, the split into train and held-out, and their tokens.

A document is held out if the hash of its text falls below the wanted fraction. That is stable: it
does not depend on the order, on the machine, or on which other documents exist, and copies of one
text never lie on both sides.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset

OK, EMPTY, UNDECODABLE = 0, 1, 2


@dataclass(frozen=True, eq=False)
class TokenizedDocument:
    """A whole document as tokens.

    Attributes:
        name: Where it comes from.
        input_ids: [n] int64, the end token included.
        document_id: Its number among the documents of its split.
    """

    name: str
    input_ids: np.ndarray
    document_id: int


@dataclass(frozen=True, eq=False)
class Documents:
    """Some rows of a dataset with a column "text".

    Attributes:
        texts: The rows, none of them empty.
        names: Their names.
        digests: [N] uint64, hashes of their texts.
        dropped_empty: Rows left out because they hold no text.
        dropped_undecodable: Files left out because they are not UTF-8.
    """

    texts: Dataset
    names: Sequence[str]
    digests: np.ndarray
    dropped_empty: int
    dropped_undecodable: int

    def __len__(self) -> int:
        return len(self.digests)

    @property
    def fingerprint(self) -> str:
        """Hash of the texts in their order."""
        return hashlib.sha256(self.digests.tobytes()).hexdigest()[:16]

    def split(self, held_out_fraction: float) -> tuple[Documents, Documents]:
        """Returns (train, held-out); neither is empty if texts differ and the fraction is above 0.

        Empty and undecodable rows are counted on the train side.
        """
        threshold = min(math.ldexp(held_out_fraction, 64), 2.0**64 - 2048)
        held_out = self.digests < np.uint64(threshold)
        if held_out_fraction > 0 and len(set(self.digests.tolist())) > 1:
            if not held_out.any():
                held_out = self.digests == self.digests.min()
            elif held_out.all():
                held_out = self.digests != self.digests.max()
        return (
            self._rows(np.flatnonzero(~held_out), self.dropped_empty, self.dropped_undecodable),
            self._rows(np.flatnonzero(held_out), 0, 0),
        )

    def _rows(self, rows: np.ndarray, empty: int, undecodable: int) -> Documents:
        names = [self.names[row] for row in rows]
        return Documents(self.texts.select(rows), names, self.digests[rows], empty, undecodable)


def read_documents(dataset: Dataset, label: str) -> Documents:
    """Hashes every text and leaves out the empty ones.

    Args:
        dataset: Columns "text" (None: not decodable) and perhaps "name".
        label: Documents without a name are called label:row.
    """
    if len(dataset) == 0:
        return Documents(dataset, [], np.array([], dtype=np.uint64), 0, 0)
    scan = dataset.map(
        _scan,
        batched=True,
        batch_size=100,
        with_indices=True,
        fn_kwargs={"label": label},
        remove_columns=dataset.column_names,
        desc="Reading documents",
    )
    state = scan.data.column("state").to_numpy()
    digests = scan.data.column("digest").to_numpy().astype(np.int64).view(np.uint64)
    kept = np.flatnonzero(state == OK)
    all_names = scan.data.column("document").take(kept).to_pylist()
    return Documents(
        dataset.select(kept),
        all_names,
        digests[kept],
        dropped_empty=int((state == EMPTY).sum()),
        dropped_undecodable=int((state == UNDECODABLE).sum()),
    )


def _scan(batch: dict[str, list[Any]], rows: list[int], label: str) -> dict[str, list[Any]]:
    texts = batch["text"]
    # A reader of files gives None for one that it cannot decode; a null in a table holds no text.
    null = UNDECODABLE if "name" in batch else EMPTY
    return {
        "digest": [_digest(text or "") for text in texts],
        "state": [null if t is None else OK if t.strip() else EMPTY for t in texts],
        "document": batch["name"] if "name" in batch else [f"{label}:{row}" for row in rows],
    }


def _digest(text: str) -> int:
    """64 bits of a hash of the text, as a signed integer for Arrow."""
    hashed = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(hashed, "little", signed=True)


class StoredTokens(Protocol):
    """What a TokenStore, or anything in its place, has: see there."""

    lengths: np.ndarray
    names: Sequence[str]

    def __len__(self) -> int: ...

    def tokens(self, document: int, start: int = 0, length: int | None = None) -> np.ndarray:
        """Returns tokens [start, start + length) of a document: [length] integers."""
        ...


class TokenStore:
    """Tokens of documents, read from the Arrow cache file without copying more than is asked for.

    Attributes:
        lengths: [N] int64, tokens of each document, the end token included.
        names: Their names.
    """

    def __init__(self, dataset: Dataset, names: Sequence[str]) -> None:
        """Wraps a dataset with a column "input_ids", one row per name."""
        self._dataset = dataset
        self._chunks = dataset.data.column("input_ids").chunks
        self._first_rows = np.cumsum([0, *(len(chunk) for chunk in self._chunks)])
        counts = [np.diff(chunk.offsets.to_numpy()) for chunk in self._chunks]
        self.lengths = np.concatenate([np.array([], dtype=np.int64), *counts]).astype(np.int64)
        self.names = names

    def __len__(self) -> int:
        return len(self.lengths)

    def __reduce__(self) -> tuple[Any, ...]:
        # A dataset pickles as the path of its cache file; Arrow chunks would pickle their data.
        return TokenStore, (self._dataset, self.names)

    def tokens(self, document: int, start: int = 0, length: int | None = None) -> np.ndarray:
        """Returns tokens [start, start + length) of a document: [length] int32, read-only."""
        place = int(np.searchsorted(self._first_rows, document, side="right")) - 1
        chunk = self._chunks[place]
        first = chunk.offsets[document - int(self._first_rows[place])].as_py() + start
        length = int(self.lengths[document]) - start if length is None else length
        return chunk.values.slice(first, length).to_numpy()
