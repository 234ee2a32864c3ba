"""Reports documents that could not be read: a warning, or an error."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from lctrain.pluralize import pluralize
from lctrain.warn import warn_once

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

ON_ERROR = ("skip", "raise")
_SHOWN = 5


def check_on_error(value: str) -> None:
    """Raises ValueError unless `value` is one of ON_ERROR: "skip" or "raise"."""
    if value not in ON_ERROR:
        raise ValueError(
            f"on_error must be one of {', '.join(ON_ERROR)}, got {value!r}. skip reads what can be "
            "read and counts the rest; raise stops at the first fault."
        )


def report_faults(dataset: Dataset, on_error: str) -> Dataset:
    """Warns about documents that a reader left out or repaired; see `lctrain.data.readers`.

    Args:
        dataset: Dataset with the column "text", and optionally "name" and "fault".
        on_error: "skip" warns about documents that could not be read; "raise" raises ValueError.

    Returns:
        The same dataset.

    Raises:
        ValueError: if there are faults and no text could be read; with on_error="raise", if any
            document could not be read.
    """
    import pyarrow.compute as pc

    if "fault" not in dataset.column_names:
        return dataset
    table = dataset.with_format("arrow")[:]
    faulty = pc.is_valid(table["fault"])
    count = pc.sum(faulty).as_py() or 0
    if not count:
        return dataset
    texts, names, messages = (table[column].filter(faulty) for column in ("text", "name", "fault"))
    shown = _one_per_file(names.to_pylist(), messages.to_pylist())
    if not pc.any(pc.greater(pc.fill_null(pc.binary_length(table["text"]), 0), 0)).as_py():
        more = f" The data hold {pluralize(count - 1, 'more fault')}." if count > 1 else ""
        raise ValueError(f"{shown[0]} Nothing else could be read.{more}")
    skipped = texts.null_count
    if on_error == "raise" and skipped:
        raise ValueError(messages.filter(pc.is_null(texts))[0].as_py())
    counts = f"{skipped:,} of {len(dataset):,} documents, lines or files could not be read"
    if skipped < count:
        counts += f", {count - skipped:,} are empty or were read in part"
    rest = f"\n  and {count - len(shown):,} more" if count > len(shown) else ""
    warn_first_rank(
        f"{counts} (data.on_error=raise stops at the first):\n  " + "\n  ".join(shown) + rest
    )
    return dataset


def _one_per_file(names: list[str], messages: list[str]) -> list[str]:
    """Returns one message for each of the first files that have faults: the file's first fault."""
    first: dict[str, str] = {}
    for name, message in zip(names, messages, strict=True):
        file, _, number = name.rpartition(":")
        first.setdefault(file if number.isdigit() else name, message)
    return list(first.values())[:_SHOWN]


def warn_first_rank(message: str) -> None:
    """Logs a warning on the first rank, and only once per process for the same message."""
    if on_first_rank():
        warn_once(log, message)


def shared_message(shared: int, documents: int, place: str) -> str:
    """Returns the warning that held-out documents are also in the training data.

    Args:
        shared: Number of these documents.
        documents: Number of held-out documents.
        place: Text before the message.
    """
    return (
        f"{place}{shared:,} of {documents:,} held-out documents are in the training data, too: a "
        "held-out loss says nothing about new text there. Leave them out of the documents to train "
        "on."
    )


def on_first_rank() -> bool:
    """Whether Lightning's rank of this process is 0."""
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    return getattr(rank_zero_only, "rank", 0) == 0
