"""Reads the recorded runs of the recipe: `results/<stage>.json`, which the stages wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"

Record = Mapping[str, Any]


def read_records(folder: Path = RESULTS) -> dict[str, Record]:
    """Returns the records in a folder by the name of their stage."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return {record["stage"]: record for record in found}


def summed_gains(record: Record) -> list[tuple[int, float]]:
    """Returns the context lengths of the stage `gain`, with the gain over the shortest one.

    The record holds the gain of each length over the next shorter one.
    """
    found = [(record["rows"][0]["compared_with"], 0.0)]
    for row in record["rows"]:
        found.append((row["length"], found[-1][1] + row["gain"]))
    return found


def gains_beyond(record: Record) -> dict[str, list[tuple[int, float]]]:
    """Returns the context lengths of the stage `beyond`, with the gain over the window.

    Returns:
        The lengths and gains by method. A negative gain is a loss by the longer context.
    """
    found: dict[str, list[tuple[int, float]]] = {}
    for row in record["rows"]:
        found.setdefault(row["method"], []).append((row["length"], row["gain"]))
    return found


def mean_scores(
    record: Record, measure: str, column: str | None = None
) -> dict[tuple[str, int], float]:
    """Returns the means of a measure by a column and the length.

    Args:
        record: Record of the stage `needle`, `needle_beyond` or `ruler`.
        measure: "score" for RULER's score, or "strict".
        column: Name of the column, such as "task"; None takes all items of a length together.
    """
    scores: dict[tuple[str, int], list[tuple[float, int]]] = {}
    for row in record["rows"]:
        key = ("" if column is None else row[column], row["length"])
        scores.setdefault(key, []).append((row[measure], row["items"]))
    return {key: _mean(pairs) for key, pairs in scores.items()}


def _mean(pairs: Sequence[tuple[float, int]]) -> float:
    return sum(score * items for score, items in pairs) / sum(items for _, items in pairs)


def gains_of_training(record: Record) -> tuple[float, float]:
    """Returns the gain of the long context over the window, before and after training.

    Args:
        record: Record of a continued training.
    """
    before, after = (_loss_by_length(record[when]) for when in ("before", "after"))
    window, long = record["window"], record["long"]
    return before[window] - before[long], after[window] - after[long]


def _loss_by_length(rows: Sequence[Record]) -> dict[int, float]:
    return {row["length"]: row["loss"] for row in rows}
