"""Documents and TokenStore: texts with their hashes, and the tokens of the texts.

Documents are split into a training and a held-out part by content: a document is held out if the
hash of its text, as a number in [0, 1), is below the held-out fraction. A document's part therefore
does not depend on the order, the machine or the other documents, and all copies of a text are in
the same part.
"""

from __future__ import annotations

import codecs
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from lctrain.data.faults import warn_first_rank
from lctrain.data.fields import BYTE_ORDER_MARK

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

OK, EMPTY, UNREADABLE = 0, 1, 2
_MARK = codecs.BOM_UTF8
_GLANCE = 1024  # bytes
GROUP_BYTES = 2**19  # UTF-8 bytes of text that are tokenized at a time


@dataclass(frozen=True, eq=False)
class TokenizedDocument:
    """A whole document as token ids.

    Attributes:
        name: Name of the document in messages, such as file:line.
        input_ids: [n] int64 token ids, the end token included.
        document_id: Number of the document in its split (training or held-out).
    """

    name: str
    input_ids: np.ndarray
    document_id: int


@dataclass(frozen=True, eq=False)
class Documents:
    """N text documents and their hashes, with counts of documents that could not be used.

    Attributes:
        texts: Dataset with N rows and the column "text", none of them empty. The methods `text` and
            `read` return texts without byte-order marks.
        names: [N] names of the documents.
        digests: [N] uint64, hashes of the texts.
        sizes: [N] int64, bytes of the texts in UTF-8.
        dropped_empty: Number of documents left out because they hold no text.
        dropped_unreadable: Number of documents, lines and files left out because they could not be
            read.
        repaired: Number of documents that were read in part, or with characters replaced.
    """

    texts: Dataset
    names: Sequence[str]
    digests: np.ndarray
    sizes: np.ndarray
    dropped_empty: int = 0
    dropped_unreadable: int = 0
    repaired: int = 0

    def __len__(self) -> int:
        return len(self.digests)

    @property
    def fingerprint(self) -> str:
        """Hash of all texts and of their order."""
        return hashlib.sha256(self.digests.tobytes()).hexdigest()[:16]

    def split(self, held_out_fraction: float, cut: bool = True) -> tuple[Documents, Documents]:
        """Splits the documents by the hashes of their texts, and returns (train, held-out).

        If the fraction is above 0 and at least two texts differ, neither part is empty. If all
        documents hold the same text, the end of that text is held out, from a line break or space
        on. The training part carries the counts of documents that were left out or repaired.

        Args:
            held_out_fraction: Fraction of the documents to hold out, in [0, 1).
            cut: Whether a text may be cut in two if all documents hold the same text.
        """
        if cut and held_out_fraction > 0 and len(set(self.digests.tolist())) == 1:
            parts = self._split_text(held_out_fraction)
            if parts is not None:
                return parts
        threshold = min(math.ldexp(held_out_fraction, 64), 2.0**64 - 2048)
        held_out = self.digests < np.uint64(threshold)
        distinct = len(set(self.digests.tolist()))
        if distinct == 1:
            held_out[:] = False
        elif held_out_fraction > 0 and distinct:
            if not held_out.any():
                held_out = self.digests == self.digests.min()
            elif held_out.all():
                held_out = self.digests != self.digests.max()
        return replace(
            self._rows(np.flatnonzero(~held_out)),
            dropped_empty=self.dropped_empty,
            dropped_unreadable=self.dropped_unreadable,
            repaired=self.repaired,
        ), self._rows(np.flatnonzero(held_out))

    def _split_text(self, held_out_fraction: float) -> tuple[Documents, Documents] | None:
        """Splits documents that all hold the same text; returns None if the text is too short."""
        text = self.text(0)
        place = _border(text, len(text) - max(1, round(len(text) * held_out_fraction)))
        beginning, end = text[:place], text[place:]
        if not beginning.strip() or not end.strip():
            return None
        warn_first_rank(
            f"The data hold only one text, {self.names[0]}: its end, from character {place:,} of "
            f"{len(text):,} on, is held out (data.held_out_fraction={held_out_fraction})."
        )
        train = _from_texts([beginning] * len(self), self.names)
        held_out = _from_texts([end], [f"{self.names[0]}, from character {place:,}"])
        return replace(
            train,
            dropped_empty=self.dropped_empty,
            dropped_unreadable=self.dropped_unreadable,
            repaired=self.repaired,
        ), held_out

    def text(self, index: int) -> str:
        """Returns the text of one document, without a byte-order mark."""
        return self.read(range(index, index + 1))[0]

    def read(self, rows: range) -> list[str]:
        """Returns the texts of the documents with indices in `rows`, without byte-order marks."""
        column = self.texts.with_format("arrow")[rows.start : rows.stop]["text"]
        return [value.as_py().removeprefix(BYTE_ORDER_MARK) for value in column]

    def groups(self) -> list[range]:
        """Divides the documents into ranges of at most GROUP_BYTES of text.

        A longer document is a range of its own.
        """
        groups, first, size = [], 0, 0
        for row, added in enumerate(self.sizes.tolist()):
            if row > first and size + added > GROUP_BYTES:
                groups.append(range(first, row))
                first, size = row, 0
            size += added
        return [*groups, range(first, len(self))] if len(self) else groups

    def _rows(self, rows: np.ndarray) -> Documents:
        names = [self.names[row] for row in rows]
        return Documents(self.texts.select(rows), names, self.digests[rows], self.sizes[rows])


def count_shared(held_out: Documents, train: Documents) -> int:
    """Returns the number of held-out documents whose text is also a training document."""
    return int(np.isin(held_out.digests, train.digests).sum())


def join_documents(parts: Sequence[Documents]) -> Documents:
    """Returns the documents of several sources one after the other; their counts are left out."""
    from datasets import concatenate_datasets

    texts = [documents.texts.select_columns("text") for documents in parts]
    return Documents(
        concatenate_datasets(texts),
        [name for documents in parts for name in documents.names],
        np.concatenate([documents.digests for documents in parts]),
        np.concatenate([documents.sizes for documents in parts]),
    )


def _border(text: str, place: int) -> int:
    """Returns the position after the last line break before `place`, or else after the last space.

    Only the second half of the text before `place` is searched. Without either, returns `place`.
    """
    for mark in ("\n", " "):
        found = text.rfind(mark, place // 2, place) + 1
        if found:
            return found
    return place


def _from_texts(texts: Sequence[str], names: Sequence[str]) -> Documents:
    from datasets import Dataset, Features, Value

    features = Features({"text": Value("large_string"), "name": Value("string")})
    return read_documents(Dataset.from_dict({"text": texts, "name": list(names)}, features), "")


def read_documents(dataset: Dataset, label: str) -> Documents:
    """Hashes every text of a dataset, and leaves out documents that are empty or unreadable.

    Args:
        dataset: Dataset with the column "text", and optionally "name" and "fault". A null text is
            unreadable if its row has a fault, and empty otherwise.
        label: Name of the dataset. A document without a name is called label:row.
    """
    none = np.array([], dtype=np.uint64)
    if len(dataset) == 0:
        return Documents(dataset, [], none, none.astype(np.int64))
    scan = dataset.with_format("arrow").map(  # arrow: one text at a time becomes a string
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
    return Documents(
        dataset.select(kept),
        scan.data.column("document").take(kept).to_pylist(),
        digests[kept],
        scan.data.column("size").to_numpy()[kept],
        dropped_empty=int((state == EMPTY).sum()),
        dropped_unreadable=int((state == UNREADABLE).sum()),
        repaired=int(scan.data.column("repaired").to_numpy()[kept].sum()),
    )


def _scan(batch: pa.Table, rows: list[int], label: str) -> pa.Table:
    import pyarrow as pa

    count = len(batch)
    faults = batch["fault"].is_valid().to_pylist() if "fault" in batch.column_names else ()
    states, digests, sizes = [], [], []
    for value, faulty in zip(batch["text"], faults or [False] * count, strict=True):
        content = memoryview(value.as_buffer() or b"").cast("B")  # UTF-8
        if content[: len(_MARK)] == _MARK:
            content = content[len(_MARK) :]
        if not value.is_valid:
            states.append(UNREADABLE if faulty else EMPTY)
        else:
            states.append(EMPTY if _is_blank(content) else OK)
        hashed = hashlib.blake2b(content, digest_size=8).digest()
        digests.append(int.from_bytes(hashed, "little", signed=True))
        sizes.append(len(content))
    names = batch["name"] if "name" in batch.column_names else [f"{label}:{row}" for row in rows]
    return pa.table(
        {
            "digest": pa.array(digests, pa.int64()),
            "size": pa.array(sizes, pa.int64()),
            "state": pa.array(states, pa.int8()),
            "repaired": pa.array(faults or [False] * count, pa.bool_()),
            "document": names,
        }
    )


def _is_blank(content: memoryview) -> bool:
    """Whether a UTF-8 text holds only white space; most texts show it in their first bytes."""
    start = bytes(content[:_GLANCE]).decode("utf-8", errors="ignore")
    return not start.strip() and (
        len(content) <= _GLANCE or not bytes(content).decode("utf-8").strip()
    )


class StoredTokens(Protocol):
    """Protocol of an object that holds the tokens of documents; TokenStore is one.

    Attributes:
        lengths: [N] int64, number of tokens of each document.
        names: [N] names of the documents.
    """

    lengths: np.ndarray
    names: Sequence[str]

    def __len__(self) -> int: ...

    def tokens(self, document: int, start: int = 0, length: int | None = None) -> np.ndarray:
        """Returns tokens [start, start + length) of a document: [length] integers."""
        ...


class TokenStore:
    """Tokens of N documents in an Arrow cache file. Only the requested tokens are copied.

    Attributes:
        lengths: [N] int64, number of tokens of each document, the end token included.
        names: [N] names of the documents.
        special_texts: Number of times that a document holds the text of a special token.
    """

    def __init__(self, dataset: Dataset, names: Sequence[str]) -> None:
        """Wraps a dataset with a column "input_ids", one row per name."""
        self._dataset = dataset
        self._chunks = dataset.data.column("input_ids").chunks
        self._first_rows = np.cumsum([0, *(len(chunk) for chunk in self._chunks)])
        counts = [np.diff(chunk.offsets.to_numpy()) for chunk in self._chunks]
        self.lengths = np.concatenate([np.array([], dtype=np.int64), *counts]).astype(np.int64)
        self.names = names
        known = "special_texts" in dataset.column_names
        self.special_texts = int(
            sum(dataset.data.column("special_texts").to_pylist()) if known else 0
        )

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
