"""Parses JSON as other languages do: NaN and Infinity are errors."""

import json
from pathlib import Path
from typing import Any


def parse_strictly(text: str) -> Any:
    """Returns the value of a JSON text; raises ValueError for what is no JSON."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def parse_files(folder: Path) -> dict[str, Any]:
    """Returns the values of all JSON files, and of all lines of JSON, below a folder by path."""
    found = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.json*")}
    return {
        name: [parse_strictly(line) for line in text.splitlines()]
        if name.endswith(".jsonl")
        else parse_strictly(text)
        for name, text in found.items()
    }
