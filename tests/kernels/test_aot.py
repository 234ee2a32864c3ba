"""Every kernel and configuration compiles for GPUs that are not here, on both ends of Triton.

`make` unpacks the oldest and the newest supported Triton beside the environment's packages; each
compiles in a process of its own. What is compiled here has not been run: see the README.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.house.typecheck import ROOT

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942", "gfx950")
VERSIONS = ("3.6.0", "3.9.0")
# Shared memory that a program may ask for, bytes: NVIDIA's opt-in limit, AMD's LDS.
SHARED_LIMITS = {
    "sm_80": 166_912,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "gfx942": 65_536,
    "gfx950": 163_840,
}


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


@cache
def compile_all(version: str, target: str) -> list[dict]:
    """The report of aot_compile.py, one entry per variant."""
    folder = triton_folder(version)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if folder is not None:
        environment["PYTHONPATH"] = str(folder)
    # Every configuration with every feature; on the newest Triton as the plain kernel too.
    features = "all" if version == VERSIONS[0] else "causal,all"
    script = ROOT / "tests" / "kernels" / "aot_compile.py"
    result = subprocess.run(
        [sys.executable, script, target, features, "64,128,256"],
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
    return reports


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("version", VERSIONS)
def test_every_kernel_compiles_to_matrix_instructions(version, target):
    reports = compile_all(version, target)
    errors = {report["name"]: report["error"] for report in reports if "error" in report}
    assert not errors
    halves = [report for report in reports if "-fp32-" not in report["name"]]
    products = [report for report in halves if not report["name"].startswith("dual_chunk_rotate")]
    scalar = [report["name"] for report in products if report["matrix_instructions"] == 0]
    assert not scalar, "these multiply without matrix instructions"
    limit = SHARED_LIMITS[target]
    large = {r["name"]: r["shared_bytes"] for r in reports if r["shared_bytes"] > limit}
    assert not large, f"these need more than the {limit} bytes of shared memory of {target}"
    promised = [report for report in reports if report["spill_free"]]
    spilling = {r["name"]: r["spill_bytes"] for r in promised if r["spill_bytes"]}
    assert not spilling, "the configuration says that these spill no registers"
    if target == "sm_90":
        assert promised, "the table of the tuned architecture promises kernels without spills"
        serialised = [r["name"] for r in halves if r["serialised"] and "-causal-" in r["name"]]
        assert not serialised, "ptxas runs the matrix instructions of these one by one"
