"""Tests that every file has the syntax of the oldest supported Python, on any interpreter."""

import ast
import re

from tests.house.typecheck import ROOT

FOLDERS = ("lctrain", "kernels", "configs", "recipes", "tests", "docs")


def oldest_python() -> tuple[int, int]:
    """Returns the lower bound of requires-python."""
    text = (ROOT / "pyproject.toml").read_text()
    major, minor = re.search(r'requires-python = ">=(\d+)\.(\d+)', text).groups()
    return int(major), int(minor)


def test_every_file_parses_with_the_oldest_grammar():
    oldest = oldest_python()
    assert oldest == (3, 10)
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 300
    for path in files:
        ast.parse(path.read_text(encoding="utf-8"), str(path), feature_version=oldest)


def test_newer_syntax_is_refused():
    """The check above rejects `except*`, which Python 3.11 introduced."""
    newer = "try:\n    pass\nexcept* ValueError:\n    pass\n"
    ast.parse(newer)
    try:
        ast.parse(newer, feature_version=(3, 10))
    except SyntaxError:
        return
    raise AssertionError("the parser accepts syntax of a newer Python")
