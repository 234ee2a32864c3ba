"""Tests docstrings: every documented argument exists, and no description is a fragment."""

import ast
import re

from tests.house.typecheck import ROOT, package_folders

FOLDERS = {*package_folders().values(), ROOT / "docs" / "builders"}
FILES = sorted({file for folder in FOLDERS for file in folder.glob("*.py")})
FILES += sorted((ROOT / "tests").rglob("*.py"))
ENTRY = re.compile(r"^    \*{0,2}(\w+): (.*)$", re.MULTILINE)
# A description names what it describes: not "Of the run", "From scratch" or "Likewise".
FRAGMENT = re.compile(r"(of|as there|from|likewise|where|by name|for messages?)\b", re.IGNORECASE)
SUMMARY_FRAGMENT = re.compile(r"(Of|Also|Likewise)\b")


def documented(file):
    """Yields (node, docstring) for the file's module, classes and functions."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield node, docstring


def section(docstring: str, title: str) -> list[tuple[str, str]]:
    """Returns (name, first line of the description) for the entries of a docstring's section."""
    _, found, rest = docstring.partition(f"{title}:\n")
    return ENTRY.findall(rest.split("\n\n")[0]) if found else []


def parameters(node: ast.FunctionDef) -> set[str]:
    every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    every += [one for one in (node.args.vararg, node.args.kwarg) if one is not None]
    return {one.arg for one in every}


def test_docstrings_describe_what_is_there():
    wrong = []
    for file in FILES:
        for node, docstring in documented(file):
            name = f"{file.relative_to(ROOT)}: {getattr(node, 'name', 'module')}"
            if isinstance(node, ast.FunctionDef):
                names = {entry for entry, _ in section(docstring, "Args")}
                wrong += [f"{name}: no parameter {one}" for one in names - parameters(node)]
            entries = section(docstring, "Args") + section(docstring, "Attributes")
            wrong += [f"{name}: {one}: {text}" for one, text in entries if FRAGMENT.match(text)]
            if SUMMARY_FRAGMENT.match(docstring):
                wrong.append(f"{name}: {docstring.splitlines()[0]}")
    assert not wrong, "\n".join(wrong)
