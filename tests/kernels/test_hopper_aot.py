"""Tests that the Hopper kernels compile without a GPU, on the oldest and the newest Triton.

Each operation's test_aot_hopper.py compares its launchers with the variants compiled here.
"""

import pytest

from lctrain_kernels.gluon import barriers
from tests.kernels.aot_process import BETWEEN, VERSIONS, compiled_reports, on_triton

SHARED_LIMIT = 232_448  # bytes that a program on sm_90 may ask for
_LATER, _FULL = ("g4-causal-bf16-64x128-" + form for form in ("later", "full"))
# Backward -> accesses to spilled registers in the loop of each warpgroup, on the oldest Triton. The
# section of 2026-12-01 in bench/NOTES.md says which registers.
KNOWN_SPILLS = {
    f"hopper_dual_chunk_bwd_succ-D128-{_LATER}": [2, 2],
    f"hopper_dual_chunk_bwd_succ-D96-{_LATER}": [2, 2],
    f"hopper_dual_chunk_bwd_intra-D96-{_LATER}": [2, 2],
    f"hopper_dual_chunk_bwd_inter-D96-{_LATER}": [2, 2],
    f"hopper_dual_chunk_bwd_intra-D128-{_FULL}": [0, 1],
    f"hopper_dual_chunk_bwd_intra-D96-{_FULL}": [0, 1],
}


@pytest.mark.slow
@pytest.mark.parametrize("version", on_triton(VERSIONS))
def test_compiles_to_what_the_hardware_has(version):
    everything = compiled_reports(version, "hopper")
    reports = [report for report in everything if report["multiplies"]]
    scalar = [report["name"] for report in reports if report["matrix_instructions"] == 0]
    assert not scalar, "these multiply without matrix instructions"
    copying = [report["name"] for report in reports if report["tma_loads"] == 0]
    assert not copying, "these load without the copy engine"
    large = {r["name"]: r["shared_bytes"] for r in everything if r["shared_bytes"] > SHARED_LIMIT}
    assert not large, f"these need more than the {SHARED_LIMIT} bytes of shared memory of sm_90"
    for report in reports:
        free = barriers.V_EMPTY.value if "_fwd-" in report["name"] else barriers.DS_FULL.value
        assert 0 in report["barriers"], "every kernel brings its first warpgroup together"
        assert max(report["barriers"]) < free, f"{report['name']}: Triton takes our barriers"
    plain = [report for report in reports if "-causal-" in report["name"]]
    serialised = [report["name"] for report in plain if report["serialised"]]
    assert not serialised, "ptxas runs the matrix instructions of these one by one"
    beside = [report for report in everything if not report["multiplies"]]
    assert beside, "the launchers prepare and round in kernels of their own"
    assert not [r["name"] for r in beside if r["spill_bytes"]], "these spill registers"
    promised = [report for report in plain if report["spill_free"]]
    assert promised, "the forward promises kernels without spills"
    for report in promised:
        assert len(report["loop_spills"]) >= 2, f"{report['name']}: where are its loops?"
    looping = [*promised, *(r for r in plain if r["name"].startswith("hopper_diff_fwd-D64"))]
    spilling = {r["name"]: r["loop_spills"] for r in looping if any(r["loop_spills"])}
    assert not spilling, "the loops of these spill registers"
    if version == VERSIONS[0]:
        backwards = [report for report in plain if "_bwd" in report["name"]]
        spilling = {r["name"]: r["loop_spills"] for r in backwards if any(r["loop_spills"])}
        assert spilling == KNOWN_SPILLS, (
            "products wait for spilled registers: see rematerialised in gluon/primitives.py"
        )
    if version == VERSIONS[0]:  # the newest stores a few arguments away when a program begins
        spilling = {r["name"]: r["spill_bytes"] for r in promised if r["spill_bytes"]}
        assert not spilling, "these spill registers"


@pytest.mark.slow
@pytest.mark.parametrize("version", on_triton(BETWEEN))
def test_compiles_on_the_releases_between(version):
    reports = compiled_reports(version, "hopper")
    kernels = {report["name"].split("-")[0] for report in reports}
    assert {"hopper_fwd", "hopper_bwd", "hopper_diff_fwd", "hopper_diff_bwd"} <= kernels
    multiplying = [report for report in reports if report["multiplies"]]
    assert all(report["matrix_instructions"] and report["tma_loads"] for report in multiplying)
