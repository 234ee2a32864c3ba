"""Tests that files and pinned packages fit the oldest supported Python, on any interpreter."""

import ast
import re
from importlib.metadata import PackageNotFoundError, distribution
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

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


def refused_pins(constraints: str) -> tuple[int, list[str]]:
    """Returns how many pins were checked, and those whose package refuses the oldest Python.

    Args:
        constraints: Text of constraints.txt. A pin is checked if the oldest Python takes it and
            this interpreter has that release installed, whose metadata says what it requires.
    """
    oldest = ".".join(map(str, oldest_python()))
    environment = {"python_version": oldest, "python_full_version": f"{oldest}.0"}
    checked, refused = 0, []
    for line in constraints.splitlines():
        if not line or line.startswith("#"):
            continue
        pin = Requirement(line)
        try:
            installed = distribution(pin.name)
        except PackageNotFoundError:
            continue
        taken = pin.marker is None or pin.marker.evaluate(environment)
        if not taken or not pin.specifier.contains(installed.version, prereleases=True):
            continue
        checked += 1
        required = installed.metadata["Requires-Python"]
        if required and not SpecifierSet(required).contains(f"{oldest}.0"):
            refused.append(line)
    return checked, refused


def test_the_oldest_python_can_install_every_pin():
    checked, refused = refused_pins((ROOT / "constraints.txt").read_text())
    assert refused == []
    if checked < 50:
        pytest.skip("needs the pinned packages")


@pytest.mark.parametrize(
    ("pin", "found"),
    [
        ("tool==2.0", (1, ["tool==2.0"])),
        ('tool==2.0 ; python_version >= "3.11"', (0, [])),
        ("tool==1.0", (0, [])),
    ],
)
def test_a_pin_that_dropped_the_oldest_python_is_found(monkeypatch, pin, found):
    tool = SimpleNamespace(version="2.0", metadata={"Requires-Python": ">=3.11"})
    monkeypatch.setattr(f"{__name__}.distribution", lambda name: tool)
    assert refused_pins(pin) == found
