"""The Makefile's set-up with an interpreter that is named by a relative path."""

import shutil
import subprocess

import pytest

from tests.house.typecheck import ROOT


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_system_python_may_be_a_relative_path(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/calls\n')
    python.chmod(0o755)
    command = ["make", "system-python", "VENV=", "PYTHON=bin/python"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "pip" not in (tmp_path / "calls").read_text()  # lctrain is there already
