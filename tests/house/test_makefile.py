"""Tests the Makefile's set-up, and that CI does nothing twice."""

import os
import shutil
import subprocess

import pytest

from tests.house.typecheck import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def test_ci_does_nothing_twice(tmp_path):
    """Prints what CI runs in a clone that is set up, and in one that is not."""
    for name in ("Makefile", "constraints.txt", "pyproject.toml", ".ci/run"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "bin").mkdir()
    make = tmp_path / "bin" / "make"
    make.write_text(f'#!/bin/sh\nexec {shutil.which("make")} --dry-run "$@"\n')
    make.chmod(0o755)
    environment = os.environ | {"PATH": f"{make.parent}{os.pathsep}{os.environ['PATH']}"}
    for name in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS"):  # pytest itself may run in make
        environment.pop(name, None)

    def printed():
        command = ["bash", ".ci/run"]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "\nmake test " in (tmp_path / ".ci" / "run").read_text()  # the README's command
    new = printed()
    for version in ("3.6.0", "3.8.0", "3.9.0"):
        assert f"triton=={version}" in new
    assert "--no-compile -c constraints.txt" in " ".join(new.split())
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").touch()
    for name in (".installed", "triton-3.6.0", "triton-3.8.0", "triton-3.9.0"):
        (tmp_path / ".venv" / name).touch()
    again = printed()
    for step in ("ruff check", "ruff format", "typecheck.py", "-m pytest -n 2"):
        assert again.count(step) == 1, step
    assert again.count("-m pytest") == 4  # two ends of the versions, other CPUs, and all tests
    assert again.count("pip install") == 2  # the two ends


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


def test_bytecode_is_kept(tmp_path):
    """Otherwise every process that a test starts would compile what it imports."""
    (tmp_path / "python").write_text('#!/bin/sh\n[ -z "$PYTHONDONTWRITEBYTECODE" ] && echo kept\n')
    (tmp_path / "python").chmod(0o755)
    makefile = f"include {ROOT}/Makefile\nkept:\n\t@./python\n"
    (tmp_path / "Makefile").write_text(makefile)
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    command = ["make", "kept"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "kept" in done.stdout.splitlines(), done.stderr
