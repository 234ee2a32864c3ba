"""Tests the scripts in docs/examples: they are short, they run, and the guide prints them."""

import pytest

from tests.forked import run_forked
from tests.house.typecheck import ROOT

LINES = {"long_context_module": 30, "own_module": 30, "fabric": 20}
GUIDE = ROOT / "docs" / "guides" / "lightning.md"


def test_every_script_is_listed():
    assert {path.stem for path in (ROOT / "docs" / "examples").glob("*.py")} == LINES.keys()


@pytest.mark.parametrize("name", LINES)
def test_scripts_are_short_and_printed(name):
    text = (ROOT / "docs" / "examples" / f"{name}.py").read_text()
    assert len(text.splitlines()) <= LINES[name]
    assert f"```python\n{text}```\n" in GUIDE.read_text()


@pytest.mark.parametrize("name", LINES)
def test_scripts_run(name, tmp_path):
    script = str(ROOT / "docs" / "examples" / f"{name}.py")
    done = run_forked(script, cwd=tmp_path, env={"LCTRAIN_CACHE": str(tmp_path / "cache")})
    swapped = done.stdout + done.stderr
    assert "lctrain_flash" in swapped or name == "long_context_module"
