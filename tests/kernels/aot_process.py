"""Runs aot_compile.py in a process of its own, on one release of the supported Triton range."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.house.typecheck import ROOT

VERSIONS = ("3.6.0", "3.9.0")
BETWEEN = ("3.7.1", "3.8.0")


def triton_folder(version: str) -> Path | None:
    """What to put on PYTHONPATH for this release; None if the environment itself has it."""
    folder = Path(sys.prefix) / f"triton-{version}"
    if folder.is_dir():
        return folder
    try:
        installed = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        installed = "none"
    if installed == version:
        return None
    missing = f"Triton {version} is not here (installed: {installed}); `make test` unpacks it"
    if os.environ.get("CI"):
        pytest.fail(missing)
    pytest.skip(missing)


def compile_all(version: str, target: str, *selection: str) -> list[dict]:
    """The report of aot_compile.py, one entry per variant; all of them have been compiled.

    Args:
        version: Of Triton, one of VERSIONS or BETWEEN.
        target: As aot_compile.py takes it.
        selection: Its other arguments.
    """
    folder = triton_folder(version)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if folder is not None:
        environment["PYTHONPATH"] = str(folder)
    script = ROOT / "tests" / "kernels" / "aot_compile.py"
    result = subprocess.run(
        [sys.executable, script, target, *selection],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    # Triton 3.10 flips this default, which changes results: every launch sets it.
    assert "TRITON_DEFAULT_FP_FUSION is unset" not in result.stderr
    reports = [json.loads(line) for line in result.stdout.splitlines()]
    assert reports, "nothing was compiled"
    assert {report["triton"] for report in reports} == {version}
    errors = {report["name"]: report["error"] for report in reports if "error" in report}
    assert not errors
    return reports
