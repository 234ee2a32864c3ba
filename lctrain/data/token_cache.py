"""Applies a function to groups of documents in parallel, and caches the rows that it returns."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

    from lctrain.data.documents import Documents

ReadGroup = Callable[[dict[str, list[int]], "Documents"], dict[str, list[Any]]]
"""Takes the bounds of a group ("first" and "stop", a list of one number each) and the documents;
returns the columns of the group's rows."""


def map_groups(
    documents: Documents,
    read_group: ReadGroup,
    features: Any,
    cache_dir: Path,
    *,
    parts: Sequence[str],
    num_proc: int | None,
    description: str,
) -> Dataset:
    """Returns the rows of all groups of documents, from the cache if they are there.

    Args:
        documents: Documents to read.
        read_group: Function from one group's row numbers and the documents to columns of rows. With
            several processes it is pickled.
        features: Columns of the rows with their types, a `datasets.Features`.
        cache_dir: Cache folder. The rows are kept in cache_dir/tokens, under a hash of the texts
            and of `parts`.
        parts: Texts that, together with the documents' texts, determine the rows; the cache key is
            their hash.
        num_proc: Number of processes; None or 1 for this process.
        description: Text of the progress bar.
    """
    from datasets import Dataset

    if len(documents) == 0:
        return Dataset.from_dict({name: [] for name in features}, features)
    text = " ".join((documents.fingerprint, *parts))
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    folder = cache_dir / "tokens"
    folder.mkdir(parents=True, exist_ok=True)
    groups = documents.groups()
    bounds = Dataset.from_dict(
        {"first": [group.start for group in groups], "stop": [group.stop for group in groups]}
    )
    with keep_environment():
        return bounds.map(
            read_group,
            batched=True,
            batch_size=1,  # a group
            fn_kwargs={"documents": documents},
            remove_columns=["first", "stop"],
            features=features,
            num_proc=num_proc if num_proc is not None and num_proc > 1 else None,
            cache_file_name=str(folder / f"{key}.arrow"),
            new_fingerprint=key,
            desc=description,
        )


@contextmanager
def keep_environment() -> Iterator[None]:
    """Context manager that restores the object `os.environ`, with its variables.

    `Dataset.map` with several processes assigns a copy to `os.environ`, which code that holds the
    object does not see.
    """
    environment, parallelism = os.environ, os.environ.get("TOKENIZERS_PARALLELISM")
    try:
        yield
    finally:
        os.environ = environment  # noqa: B003 - the same object as before
        if parallelism is None:
            os.environ.pop("TOKENIZERS_PARALLELISM", None)
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = parallelism
