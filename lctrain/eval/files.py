"""Writes the rows of an evaluation as CSV, and the rows with the settings as JSON."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lctrain_kernels.strict_json import finite, write_json


def write_rows(
    output_dir: str | Path,
    stem: str,
    rows: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
) -> dict[str, Path]:
    """Writes <stem>.csv and <stem>.json.

    A number that is not finite, such as the standard error over a single document, is empty in the
    CSV file and null in the JSON file.

    Args:
        output_dir: Folder of the files, which is created if needed.
        stem: Name of the files without their suffix.
        rows: Rows with the same keys, at least one.
        settings: Settings of the evaluation, which are written to the JSON file only.

    Returns:
        The paths of the files by "csv", "json" and "png". The caller draws the PNG file.
    """
    paths = write_table(output_dir, stem, rows, settings)
    return paths | {"png": paths["csv"].with_suffix(".png")}


def write_table(
    output_dir: str | Path,
    stem: str,
    rows: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
) -> dict[str, Path]:
    """Writes <stem>.csv and <stem>.json, and returns their paths; see `write_rows`."""
    folder = Path(output_dir).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    paths = {kind: folder / f"{stem}.{kind}" for kind in ("csv", "json")}
    known = [finite(row) for row in rows]
    with paths["csv"].open("w", newline="") as file:
        writer = csv.DictWriter(file, list(known[0]))
        writer.writeheader()
        writer.writerows(known)
    content = {**settings, "rows": known}
    write_json(paths["json"], content)
    return paths
