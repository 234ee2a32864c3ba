"""Builds the page of what was compiled and run, from compile reports and benchmark records."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = "reference/tested.md"
REPORTS = ROOT / "tests" / "kernels" / "aot_reports"
RECORDS = ROOT / "kernels" / "lctrain_kernels" / "bench" / "results"
GPUS = {
    "sm_80": "A100 (sm_80)",
    "sm_90": "H100, H200 (sm_90)",
    "sm_100": "B200 (sm_100)",
    "gfx942": "MI300X (gfx942)",
    "gfx950": "MI355X (gfx950)",
    "hopper": "H100, H200 (sm_90)",
}
PACKAGES = ("torch", "triton", "transformers", "lightning", "hydra-core", "peft", "trl")
HEAD = """# What was compiled and run

This page is generated from the reports of ahead-of-time compilation, the recorded measurements,
`pyproject.toml`, `constraints.txt` and the `Makefile`. The [support matrix](../support.md) says
what it means for a user.
"""


def tested_page() -> str:
    """Returns the page as Markdown."""
    return "\n".join([HEAD, compiled_section(), run_section(), software_section()])


def table(columns: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def compiled_section() -> str:
    """Returns the releases of Triton that compiled each kernel for each GPU in the tests."""
    releases: dict[tuple[str, str], set[str]] = {}
    for file in sorted(REPORTS.glob("triton-*.jsonl")):
        release = file.stem.removeprefix("triton-")
        for line in file.read_text().splitlines():
            report = json.loads(line)
            kernel = report["name"].partition("-")[0]
            releases.setdefault((kernel, report["target"]), set()).add(release)
    rows = (
        [f"`{kernel}`", GPUS[target], ", ".join(sorted(found))]
        for (kernel, target), found in sorted(releases.items())
    )
    text = "## Compiled ahead of time\n\nEach row has at least one variant per release of Triton; "
    text += "kernels named `hopper_*` are the Gluon ones.\n\n"
    return text + table(["kernel", "GPU", "Triton"], rows)


def run_section() -> str:
    """Returns the GPUs and versions of all recorded measurements."""
    rows = []
    for file in sorted(RECORDS.rglob("*.json")):
        record = json.loads(file.read_text())
        if "device" not in record:  # the record of a simulation
            continue
        versions = record["versions"]
        cells = [versions.get(name, "") for name in ("torch", "triton", "transformers")]
        name = f"`{file.relative_to(RECORDS)}`"
        rows.append([record["date"][:10], record["device"], *cells, name])
    columns = ["date", "GPU", "torch", "Triton", "transformers", "record"]
    return "## Run on a GPU and timed\n\n" + table(columns, iter(sorted(rows, reverse=True)))


def software_section() -> str:
    """Returns supported ranges, the pinned release, and the other releases that the tests use."""
    project = (ROOT / "pyproject.toml").read_text()
    pins = (ROOT / "constraints.txt").read_text()
    make = (ROOT / "Makefile").read_text()
    rows = []
    for name in PACKAGES:
        supported = re.search(rf'^\s*"{name}([^";]*)', project, re.MULTILINE)
        pinned = re.findall(rf"^{name}==(\S+)", pins, re.MULTILINE)
        variable = name.partition("-")[0].upper()
        ends = re.findall(rf"^(?:OLDEST|BETWEEN|NEWEST)_{variable} := (\S+)", make, re.MULTILINE)
        bounds = supported[1] if supported and supported[1] else "any"
        rows.append([name, f"`{bounds}`", ", ".join(pinned), ", ".join(ends)])
    python = re.search(r'requires-python = "([^"]*)"', project)
    rows.insert(0, ["Python", f"`{python[1] if python else ''}`", "", ""])
    columns = ["package", "supported", "pinned", "also in the tests"]
    return "## Software\n\n" + table(columns, iter(rows))
