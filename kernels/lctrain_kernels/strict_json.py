"""JSON as every reader accepts it: numbers that are not finite are null.

Python's `json` writes NaN and Infinity, which are no JSON: browsers, jq and most languages refuse
the whole file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def to_json(value: Any, **options: Any) -> str:
    """Returns a value as JSON.

    Args:
        value: A value that `json.dumps` takes.
        **options: Options of `json.dumps`, such as `indent`.
    """
    if (default := options.get("default")) is not None:
        options["default"] = lambda other: finite(default(other))
    return json.dumps(finite(value), allow_nan=False, **options)


def write_json(path: Path, value: Any, indent: int = 2, **options: Any) -> None:
    """Writes a value as JSON, with a newline at the end; see `to_json`."""
    path.write_text(to_json(value, indent=indent, **options) + "\n", encoding="utf-8")


def finite(value: Any) -> Any:
    """Returns a value with None for every number in it that is not finite.

    Args:
        value: A number, text, mapping, list or tuple; other values are returned as they are.
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return value


def number(value: float | None) -> float:
    """Returns a number that was read from JSON: NaN for null."""
    return math.nan if value is None else float(value)
