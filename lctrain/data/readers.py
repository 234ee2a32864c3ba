"""Generators that read documents from files: one row {"text", "name"} per document.

A file is given as (path, name, size, modification time): the last two are not read, they are there
so that the cache of `datasets`, which is keyed by the arguments, notices a file that has changed.
"""

from __future__ import annotations

import glob
import gzip
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

File = tuple[str, str, int, int]
Row = dict[str, str | None]

_LINE_PREVIEW = 80


def describe_files(paths: Sequence[Path], names: Sequence[str]) -> tuple[File, ...]:
    """Adds size in bytes and modification time in nanoseconds to every file."""
    stats = [path.stat() for path in paths]
    return tuple(
        (str(path), name, stat.st_size, stat.st_mtime_ns)
        for path, name, stat in zip(paths, names, stats, strict=True)
    )


def match_files(patterns: Sequence[str]) -> list[Path]:
    """Expands files and globs (** crosses folders), sorted within each pattern, without repeats.

    Raises:
        ValueError: if a pattern matches no file.
    """
    if not patterns:
        raise ValueError("files must name at least one file or glob, got none. Set data.files.")
    found: dict[Path, None] = {}
    for pattern in patterns:
        expanded = os.path.expanduser(pattern)
        matches = [Path(match) for match in sorted(glob.glob(expanded, recursive=True))]
        if not matches and Path(expanded).exists():  # a name that holds glob characters
            matches = [Path(expanded)]
        files = [match for match in matches if match.is_file()]
        if not files:
            folder = "; it is a folder, append /**/*.txt" if Path(expanded).is_dir() else ""
            raise ValueError(
                f"files must match at least one file, got {pattern!r} which matches none{folder}. "
                f"Check the path; it is relative to {os.getcwd()}."
            )
        found.update(dict.fromkeys(files))
    return list(found)


def read_text(files: tuple[File, ...], skip_undecodable: bool) -> Iterator[Row]:
    """One document per file; the text is None where a skipped file is not UTF-8."""
    for path, name, *_ in files:
        try:
            yield {"text": Path(path).read_bytes().decode("utf-8"), "name": name}
        except UnicodeDecodeError as error:
            if not skip_undecodable:
                raise ValueError(
                    f"files must be UTF-8 text, got {path} with byte {error.start} that is not. "
                    "Convert it, or leave it out of data.files."
                ) from error
            yield {"text": None, "name": name}


def read_jsonl(files: tuple[File, ...], field: str) -> Iterator[Row]:
    """One document per line; blank lines are skipped, .gz files are decompressed."""
    for path, name, *_ in files:
        opened = gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb")  # noqa: SIM115
        with opened as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    text = _parse_line(line, field, f"{path}:{number}")
                    yield {"text": text, "name": f"{name}:{number}"}


def _parse_line(line: bytes, field: str, where: str) -> str:
    try:
        record: Any = json.loads(line)
    except ValueError as error:  # not JSON, or not UTF-8
        preview = line[:_LINE_PREVIEW].decode("utf-8", errors="replace").strip()
        raise ValueError(
            f"{where}: a line must be JSON, got {preview!r} ({error}). Fix or remove this line."
        ) from error
    if not isinstance(record, dict) or field not in record:
        got = f"fields {sorted(record)}" if isinstance(record, dict) else type(record).__name__
        raise ValueError(
            f"{where}: a line must be an object with field {field!r}, got {got}. "
            "Set data.field to the field that holds the text."
        )
    if not isinstance(record[field], str):
        raise ValueError(
            f"{where}: field {field!r} must be a string, got {type(record[field]).__name__}. "
            "Fix this line, or set data.field to the field that holds the text."
        )
    return record[field]
