"""Applies `max_documents` and `max_bytes`, the limits on the documents of a source."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset

    from lctrain.data.readers import File


def head(dataset: Dataset, max_documents: int | None, max_bytes: int | None) -> Dataset:
    """Returns the first documents of a dataset, within both limits, but at least one document."""
    import pyarrow.compute as pc

    if max_documents is None and max_bytes is None:
        return dataset
    sizes = np.zeros(len(dataset), dtype=np.int64)
    if max_bytes is not None:
        counted = pc.binary_length(dataset.data.column("text"))
        sizes = pc.fill_null(counted, 0).to_numpy().astype(np.int64)
    return dataset.select(range(_count(sizes, max_documents, max_bytes)))


def choose_by_hash(
    files: tuple[File, ...], max_documents: int | None, max_bytes: int | None
) -> tuple[File, ...]:
    """Chooses files by a hash of their names, within both limits, in the given order of files."""
    if max_documents is None and max_bytes is None:
        return files
    hashes = [hashlib.sha256(name.encode()).digest() for _, name, *_ in files]
    by_hash = sorted(range(len(files)), key=hashes.__getitem__)
    sizes = np.array([files[i][2] for i in by_hash])
    return tuple(files[i] for i in sorted(by_hash[: _count(sizes, max_documents, max_bytes)]))


def _count(sizes: np.ndarray, max_documents: int | None, max_bytes: int | None) -> int:
    """Returns the number of leading documents that both limits allow, but at least one.

    Args:
        sizes: [N] int64, bytes of the documents.
        max_documents: Largest number of documents; None for no limit.
        max_bytes: Largest sum of sizes; None for no limit.
    """
    count = len(sizes) if max_documents is None else min(max_documents, len(sizes))
    if max_bytes is not None:
        count = min(count, int(np.searchsorted(sizes.cumsum(), max_bytes, side="right")))
    return max(count, min(1, len(sizes)))
