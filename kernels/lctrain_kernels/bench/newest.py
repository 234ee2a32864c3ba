"""Finds the newest record of a kind of benchmark."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def newest_record(
    kind: str, results: Path = RESULTS, suits: Callable[[Mapping[str, Any]], bool] | None = None
) -> dict[str, Any] | None:
    """Returns the newest record of a kind, by the date in the file; None without one.

    Args:
        kind: Name of the folder of the kind.
        results: Folder that holds the folders of all kinds.
        suits: Function that returns whether a record counts; None counts all.
    """
    records = [json.loads(path.read_text()) for path in (results / kind).glob("*.json")]
    records = [record for record in records if suits is None or suits(record)]
    return max(records, key=lambda record: record["date"], default=None)


def records_of(kind: str, results: Path = RESULTS) -> list[dict[str, Any]]:
    """Returns all records of a kind, in the order of their dates.

    Args:
        kind: Name of the folder of the kind.
        results: Folder that holds the folders of all kinds.
    """
    records = [json.loads(path.read_text()) for path in (results / kind).glob("*.json")]
    return sorted(records, key=lambda record: str(record["date"]))


def origin(record: Mapping[str, Any]) -> str:
    """Returns device, date and versions of a record, as a sentence."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return f"One {record['device']}, {record['date'][:10]}; {versions}."
