"""Tests that evaluation and recipes say each distinct warning once."""

import ast
from pathlib import Path

from tests.house.typecheck import ROOT

FOLDERS = ("lctrain/eval", "recipes")
FILES = ("lctrain/evaluate.py", "lctrain/closing.py", "lctrain/callbacks/long_context_eval.py")
LOUD = {"warning", "warn"}


def loud_lines(path: Path) -> list[int]:
    """Returns the lines that warn on every call, through `logging` or `warnings`."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    return [
        call.lineno
        for call in calls
        if isinstance(call.func, ast.Attribute) and call.func.attr in LOUD
    ]


def test_evaluation_and_recipes_warn_through_warn_once():
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    paths += [ROOT / file for file in FILES]
    found = {str(path.relative_to(ROOT)): lines for path in paths if (lines := loud_lines(path))}
    assert not found, "use lctrain.warn.warn_once, which says each message once per command"


def test_a_recipe_begins_its_warnings():
    mains = [*(ROOT / "recipes").rglob("__main__.py")]
    assert mains
    assert [path for path in mains if "begin_warnings()" not in path.read_text()] == []
