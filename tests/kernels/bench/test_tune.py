"""Tests the tuners: tables can hold every candidate, and a dry run times every operation."""

import json
import re
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from lctrain_kernels.bench import tune, tune_differential, tuning
from lctrain_kernels.bench.differential import DIFFERENTIAL_WORKLOADS
from lctrain_kernels.bench.workloads import Workload
from lctrain_kernels.differential import hopper_support
from lctrain_kernels.gluon import barriers
from lctrain_kernels.gluon.config import (
    backward_tile,
    forward_tile,
)
from lctrain_kernels.tile.config import _OVERRIDES

OFFERED = [
    (operation, head_dim, candidate)
    for operation, by_head_dim in tune.CANDIDATES.items()
    for head_dim, candidates in by_head_dim.items()
    for candidate in candidates.split()
]


@pytest.mark.parametrize(("operation", "head_dim", "candidate"), OFFERED)
def test_a_candidate_is_forced_and_given_up(operation, head_dim, candidate):
    columns = max(64, 128 if head_dim == 96 else head_dim)
    numbers = [int(part) for part in candidate.split(",")]
    look = {
        "hopper_fwd": lambda: forward_tile(columns, 1, False),
        "hopper_bwd": lambda: backward_tile(columns, False, True),
    }.get(operation, lambda: _OVERRIDES.get(operation))
    before = look()
    with tune.override(operation, candidate):
        found = look()
        if operation.startswith("hopper"):
            assert list(map(int, found)) == numbers
        else:
            assert [found.block_m, found.block_n, found.num_warps] == numbers[:3]
    assert look() == before


def test_every_stage_has_a_named_barrier():
    for operation in ("hopper_fwd", "hopper_bwd"):
        for candidates in tune.CANDIDATES[operation].values():
            for candidate in candidates.split():
                assert 2 <= int(candidate.split(",")[1]) <= barriers.MOST_STAGES, candidate
    for dims in hopper_support.COLUMNS:
        if dims != (128, 128, False):
            stages = hopper_support.backward_tile(*dims).stages
            assert barriers.barriers_fit("differential_bwd", stages)


@pytest.mark.parametrize("columns", [64, 128])
def test_the_tiles_in_use_are_offered(columns):
    used = [("hopper_fwd", forward_tile(columns, pack, False)) for pack in (1, 4)]
    for operation, tile in [*used, ("hopper_bwd", backward_tile(columns, False, True))]:
        candidate = ",".join(str(int(number)) for number in tile)
        assert candidate in tune.CANDIDATES[operation][columns].split()


PORTABLE = [name for name in tune.CANDIDATES if not name.startswith("hopper")]
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU here")


def dry_run(tuner, workload, operations, tmp_path):
    """Runs the tuner in Triton's interpreter, with a timer that always returns 0.5 ms."""
    output = tmp_path / "rows.json"
    arguments = ["--workloads", workload.name, "--operations", operations]
    arguments += ["--candidates", "32,32,4,1", "--output", str(output)]
    tuner = replace(tuner, workloads={workload.name: workload})

    rows = tuning.main(tuner, "", "", "", arguments, lambda call: 0.5, "cpu")
    assert json.loads(output.read_text()) == rows
    return rows


@on_cpu
def test_a_dry_run_times_every_portable_operation(tmp_path):
    workload = Workload("tiny", (20,), 1, 1, 16)
    rows = dry_run(tune.TUNER, workload, ",".join(PORTABLE), tmp_path)
    assert [row["operation"] for row in rows] == PORTABLE
    assert all(row["ms"] == 0.5 and row["error"] is None for row in rows), rows


@on_cpu
@pytest.mark.parametrize("name", ["v1_mix32k", "v2_mix32k"])
def test_a_dry_run_times_differential_attention(name, tmp_path):
    workload = replace(
        DIFFERENTIAL_WORKLOADS[name], lengths=(20,), heads=1, heads_kv=1, head_dim=16
    )
    workload = replace(workload, value_dim=16)
    operations = list(tune_differential.CANDIDATES)
    rows = dry_run(tune_differential.TUNER, workload, ",".join(operations), tmp_path)
    assert [row["operation"] for row in rows] == operations
    assert all(row["ms"] == 0.5 and row["error"] is None for row in rows), rows


class FakeCase:
    """Returns two tensors; candidate "nan" makes the second NaN, candidate "bad" raises."""

    candidate = None

    def run(self, operation):
        if FakeCase.candidate == "bad":
            raise RuntimeError("out of resource")
        second = torch.full((2,), float("nan") if FakeCase.candidate == "nan" else 1.0)
        return torch.ones(2), second


class FakeOverride:
    def __init__(self, operation, candidate):
        self.candidate = candidate

    def __enter__(self):
        FakeCase.candidate = self.candidate

    def __exit__(self, *_):
        FakeCase.candidate = None


FAKE = tuning.Tuner(
    {"tiny": Workload("tiny", (3,), 1, 1, 16)},
    {"a_fwd": {16: "good nan bad"}},
    tune.head_dim_of,
    lambda *_: FakeCase(),
    FakeOverride,
)


def test_a_candidate_with_a_wrong_result_is_left_out():
    rows = tuning.main(FAKE, "", "tiny", "a_fwd", [], lambda call: 1.0, "cpu")
    assert [row["ms"] for row in rows] == [1.0, None, None]
    assert "differs" in rows[1]["error"], "a NaN in a later result"
    assert "out of resource" in rows[2]["error"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workloads", "1x33k"], "--workloads must be among 1x32k.*got 1x33k"),
        (["--operations", "fwd"], "--operations must be among varlen_fwd.*got fwd"),
        (["--candidates", "64,x,4,3"], "--candidates of varlen_fwd must be like 64,64.*64,x,4,3"),
        (["--candidates", "64"], "--candidates of varlen_fwd must be like"),
        (["--operations", "hopper_bwd", "--candidates", "64,2"], "--candidates of hopper_bwd"),
        (["--dropout", "1"], r"--dropout must be in \[0, 1\)"),
        (["--output", "no/such/folder/rows.json"], "--output must be in a folder that exists"),
    ],
)
def test_bad_arguments_end_before_anything_is_timed(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        tuning.main(tune.TUNER, "", "1x32k", "varlen_fwd", arguments, lambda call: 1.0, "cpu")
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err.replace("\n", " "))
