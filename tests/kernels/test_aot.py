"""Every kernel and configuration compiles for GPUs that are not here, on both ends of Triton.

`make` unpacks the oldest and the newest supported Triton beside the environment's packages; each
compiles in a process of its own. A variant is compiled where `aot_reports/` has no report of it.
"""

import pytest

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
    halves = [report for report in reports if "-fp32-" not in report["name"]]
    scalar = [r["name"] for r in halves if r["multiplies"] and r["matrix_instructions"] == 0]
    assert not scalar, "these multiply without matrix instructions"
    limit = SHARED_LIMITS[target]
    large = {r["name"]: r["shared_bytes"] for r in reports if r["shared_bytes"] > limit}
    assert not large, f"these need more than the {limit} bytes of shared memory of {target}"
    promised = [report for report in reports if report["spill_free"]]
    spilling = {r["name"]: r["spill_bytes"] for r in promised if r["spill_bytes"]}
    assert not spilling, "the configuration says that these spill no registers"
    if target == TUNED:
        assert promised, "the table of the tuned architecture promises kernels without spills"
        serialised = [r["name"] for r in halves if r["serialised"] and "-causal-" in r["name"]]
        assert not serialised, "ptxas runs the matrix instructions of these one by one"
