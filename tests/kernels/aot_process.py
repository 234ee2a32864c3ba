"""Keeps a report of every ahead-of-time compilation in the repository, and renews missing ones.

A report holds the registers, spills and machine code hash of one variant.
`python -m tests.kernels.aot_process` compiles every variant without a report, on each Triton that
`make test` unpacks, and deletes reports that belong to no variant. `--all` compiles all variants.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest

from tests.house.typecheck import ROOT

VERSIONS = ("3.6.0", "3.9.0")
BETWEEN = ("3.7.1", "3.8.0")
REPORTS = Path(__file__).with_name("aot_reports")

Selection = tuple[str, tuple[str, ...], tuple[int, ...], tuple[int, ...]]

TUNED = "sm_90"
TARGETS = ("sm_80", TUNED, "sm_100", "gfx942", "gfx950")
_DIMS = (64, 128, 256)
_HOPPER_DIMS = (64, 96, 128, 256)


def _selections(version: str) -> tuple[Selection, ...]:
    if version in BETWEEN:  # one head dim of each attention: names differ there, if anything
        return (("hopper", ("causal",), (128,), (4,)),)
    oldest = version == VERSIONS[0]
    part = ("all",) if oldest else ("causal",)
    portable = (
        (target, ("causal", "offset_dropout", "all") if target == TUNED else part, _DIMS, ())
        for target in TARGETS
    )
    return (
        *portable,
        ("hopper", ("causal", "deterministic"), _HOPPER_DIMS, (1, 2, 4) if oldest else (4,)),
        ("hopper", ("all",), _DIMS if oldest else (64,), (4,)),
        ("hopper", ("offset_dropout",), (128,), (4,)),
    )


SELECTIONS = {version: _selections(version) for version in (*VERSIONS, *BETWEEN)}
"""Triton version -> what compiles on it: target, features, head dims, group sizes.

The tuned architecture compiles every feature on both ends of Triton. For the others, which nobody
has run, each end compiles a part: the oldest the kernels with every feature, the newest the plain
ones and float32's.
"""


def triton_folder(version: str) -> Path | None:
    """Returns the folder of an unpacked Triton release, for PYTHONPATH; None if it is installed."""
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


def on_triton(versions: Sequence[str]) -> list:
    """Returns test parameters that run all tests of one Triton on one worker, to compile once."""
    return [
        pytest.param(version, marks=pytest.mark.xdist_group(f"triton-{version}"))
        for version in versions
    ]


def compiled_reports(version: str, target: str) -> list[dict]:
    """Returns a report for every variant of a target, compiling variants without a report.

    Args:
        version: Triton version, a key of SELECTIONS.
        target: Target as `aot_compile.py` takes it.
    """
    return [report for report in _reports(version) if report["target"] == target]


@cache
def _reports(version: str) -> list[dict]:
    return run(version, SELECTIONS[version], kept_reports(version))


def run(version: str, selections: Sequence[Selection], known: dict[str, dict]) -> list[dict]:
    """Runs aot_compile.py on one Triton; raises unless every variant compiles.

    Args:
        version: Triton version.
        selections: Selections to compile.
        known: Reports by key; variants with these keys are not compiled.

    Returns:
        One report per variant, in order. "compiled" is true if the variant had no report;
        "multiplies" is true if the kernel has matrix products.
    """
    folder = triton_folder(version)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(path) for path in (folder, ROOT, ROOT / "kernels") if path is not None]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    script = ROOT / "tests" / "kernels" / "aot_compile.py"
    request = json.dumps({"selections": selections, "known": sorted(known)})
    result = subprocess.run(
        [sys.executable, script, request], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    # Triton 3.10 flips this default, which changes results: every launch sets it.
    assert "TRITON_DEFAULT_FP_FUSION is unset" not in result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert lines, "the selections describe no variant"
    assert {line["triton"] for line in lines} == {version}
    errors = {line["name"]: line["error"] for line in lines if "error" in line}
    assert not errors
    return [
        known[line["key"]] | line | {"compiled": False}
        if line["key"] in known
        else line | {"compiled": True}
        for line in lines
    ]


def kept_reports(version: str) -> dict[str, dict]:
    """Returns the repository's reports for a Triton version, by key; none if LCTRAIN_AOT=all."""
    file = REPORTS / f"triton-{version}.jsonl"
    if os.environ.get("LCTRAIN_AOT") == "all" or not file.is_file():
        return {}
    reports = [json.loads(line) for line in file.read_text().splitlines()]
    return {report["key"]: report for report in reports}


def update(version: str, known: dict[str, dict]) -> tuple[int, int]:
    """Compiles the variants without a report on one Triton version, and writes all reports.

    Returns:
        The number of variants, and the number that was compiled.
    """
    reports = run(version, SELECTIONS[version], known)
    kept = {}
    for report in reports:
        del report["selection"], report["multiplies"]
        kept[report["target"], report["name"], report["key"]] = report
    compiled = sum(report.pop("compiled") for report in kept.values())
    REPORTS.mkdir(exist_ok=True)
    lines = [json.dumps(kept[key], sort_keys=True) for key in sorted(kept)]
    (REPORTS / f"triton-{version}.jsonl").write_text("\n".join(lines) + "\n")
    return len(kept), compiled


def main() -> None:
    """Compiles variants without a report, and writes their reports to the repository."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="compile what has a report, too")
    parser.add_argument("--triton", nargs="*", default=list(SELECTIONS), choices=list(SELECTIONS))
    options = parser.parse_args()
    for version in options.triton:
        known = {} if options.all else kept_reports(version)
        total, compiled = update(version, known)
        print(f"Triton {version}: {total} variants, {compiled} compiled", flush=True)


if __name__ == "__main__":
    main()
