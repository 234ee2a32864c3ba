"""Files of an evaluation: its rows as CSV and, beside its settings, as JSON."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write_rows(
    output_dir: str | Path,
    stem: str,
    rows: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
) -> dict[str, Path]:
    """Writes <stem>.csv and <stem>.json.

    Numbers that do not exist (the standard error of one document) are empty in the CSV and null in
    the JSON.

    Args:
        output_dir: Folder, which is made if needed.
        stem: Name of the files without their ending.
        rows: At least one; all have the same keys.
        settings: What the rows have in common, for the JSON.

    Returns:
        The paths by "csv", "json" and "png"; the plot is the caller's to draw.
    """
    folder = Path(output_dir).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    paths = {kind: folder / f"{stem}.{kind}" for kind in ("csv", "json", "png")}
    known = [{key: _known(value) for key, value in row.items()} for row in rows]
    with paths["csv"].open("w", newline="") as file:
        writer = csv.DictWriter(file, list(known[0]))
        writer.writeheader()
        writer.writerows(known)
    content = {**settings, "rows": known}
    paths["json"].write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    return paths


def _known(value: Any) -> Any:
    """Returns a value, or None in place of a number that is not finite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
