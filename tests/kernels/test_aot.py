"""Tests that every kernel compiles for all supported GPUs, on the oldest and the newest Triton.

`make` unpacks both Triton releases beside the environment's packages; each compiles in a process of
its own. Only variants without a report in `aot_reports/` are compiled.
"""

import ast
import re
from pathlib import Path

import pytest

from tests.house.test_architecture import SOURCES
from tests.kernels.aot_process import TARGETS, TUNED, VERSIONS, compiled_reports, on_triton

# Shared memory that a program may ask for, bytes: NVIDIA's opt-in limit, AMD's LDS.
SHARED_LIMITS = {
    "sm_80": 166_912,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "gfx942": 65_536,
    "gfx950": 163_840,
}


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("version", on_triton(VERSIONS))
def test_every_kernel_compiles_to_matrix_instructions(version, target):
    reports = compiled_reports(version, target)
    halves = [report for report in reports if "fp32" not in report["name"].split("-")]
    scalar = [r["name"] for r in halves if r["multiplies"] and r["matrix_instructions"] == 0]
    assert not scalar, "these multiply without matrix instructions"
    limit = SHARED_LIMITS[target]
    large = {r["name"]: r["shared_bytes"] for r in reports if r["shared_bytes"] > limit}
    assert not large, f"these need more than the {limit} bytes of shared memory of {target}"
    exact = [r for r in reports if r["name"].endswith("-fp32") and "fast_divisions" in r]
    inexact = [r["name"] for r in exact if r["fast_divisions"]]
    assert not inexact, "float32's error must be that of PyTorch, which divides as IEEE 754 asks"
    promised = [report for report in reports if report["spill_free"]]
    spilling = {r["name"]: r["spill_bytes"] for r in promised if r["spill_bytes"]}
    assert not spilling, "the configuration says that these spill no registers"
    if target == TUNED:
        assert promised, "the table of the tuned architecture promises kernels without spills"
        serialised = [r["name"] for r in halves if r["serialised"] and "-causal-" in r["name"]]
        assert not serialised, "ptxas runs the matrix instructions of these one by one"


def kernels_of(path: Path) -> set[str]:
    """Returns the names of the compiled functions in a file that are launched as kernels."""
    functions = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]
    compiled = [n for n in functions if any("jit" in ast.unparse(d) for d in n.decorator_list)]
    return {function.name for function in compiled if function.name.endswith("_kernel")}


def test_every_kernel_is_in_the_list_of_its_folder():
    folders = {path.parent for name, path in SOURCES.items() if name.startswith("lctrain_kernels.")}
    unlisted = []
    for folder in folders:
        lists = "".join(path.read_text() for path in folder.glob("aot*.py"))
        kernels = set().union(*map(kernels_of, folder.glob("*.py")))
        unlisted += [name for name in kernels if not re.search(rf"\b{name}\b", lists)]
    assert not unlisted, "no ahead-of-time list compiles these"
