"""Every kernel and configuration compiles for GPUs that are not here, on both ends of Triton.

`make` unpacks the oldest and the newest supported Triton beside the environment's packages; each
compiles in a process of its own. For the tuned architecture both compile everything. For the
others, which have not been run (see the README), each compiles a part: the oldest the kernels with
every feature, the newest the plain ones and float32's.
"""

import pytest

from tests.kernels.aot_process import VERSIONS, compile_all

TUNED = "sm_90"
TARGETS = ("sm_80", TUNED, "sm_100", "gfx942", "gfx950")
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
@pytest.mark.parametrize("version", VERSIONS)
def test_every_kernel_compiles_to_matrix_instructions(version, target):
    part = "all" if version == VERSIONS[0] else "causal"
    reports = compile_all(version, target, "causal,all" if target == TUNED else part, "64,128,256")
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
    if target == TUNED:
        assert promised, "the table of the tuned architecture promises kernels without spills"
        serialised = [r["name"] for r in halves if r["serialised"] and "-causal-" in r["name"]]
        assert not serialised, "ptxas runs the matrix instructions of these one by one"
