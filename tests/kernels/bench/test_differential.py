"""Tests the benchmark of differential attention on tiny CPU tensors, with a fake clock."""

import dataclasses

import pytest
import torch

from lctrain_kernels.bench import differential as bench
from lctrain_kernels.bench.accuracy import ErrorRatio
from lctrain_kernels.bench.record import BenchmarkRecord
from lctrain_kernels.bench.run import new_record
from tests.numerics import assert_equal_in_float64

CPU = torch.device("cpu")
TINY = {
    1: bench.DifferentialWorkload("tiny", (13, 1, 20), 2, 2, 16, value_dim=32),
    2: bench.DifferentialWorkload("tiny", (13, 1, 20), 4, 2, 16, value_dim=16, version=2),
}


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)


def timed_once(call):
    call()
    return 2.0


def run_tiny(version, contenders) -> BenchmarkRecord:
    record = new_record([], CPU, repetitions=1, milliseconds=1)
    bench.run_workload(record, TINY[version], contenders, CPU, timed_once)
    return record


@pytest.mark.parametrize("version", TINY)
def test_ours_and_our_separate_calls(version):
    record = run_tiny(version, ["lctrain", "lctrain_calls"])
    ours, calls = record.results
    assert (ours.status, calls.status) == ("ok", "ok")
    assert ours.forward_tflops == TINY[version].forward_flops / 2.0 / 1e9
    assert "dlam" in ours.error_ratios
    assert calls.error_ratios is None
    text = bench.describe(record, "tiny")
    assert "ours is 1.00x / 1.00x" in text
    assert "plain PyTorch's" in text


@pytest.mark.parametrize("version", TINY)
def test_separate_calls_compute_the_same(version):
    inputs = bench.make_inputs(TINY[version], CPU, torch.float64)
    (expected,) = bench.ours(inputs)()
    outputs = bench.separate_calls(inputs, bench.our_attention(inputs))()
    if version == 1:
        first, second = torch.cat(outputs[:2], 2), torch.cat(outputs[2:], 2)
        outputs = [first - inputs.lam * second]
    assert_equal_in_float64(outputs[0], expected)


def test_flops_count_units():
    """In units of N^2 D per pair of heads: version 1 needs 6 and 10, version 2 needs 4 and 8."""
    for version, units in ((1, (6, 10)), (2, (4, 8))):
        workload = dataclasses.replace(TINY[version], lengths=(10,))
        unit = 10**2 * workload.heads * workload.head_dim
        assert (workload.forward_flops, workload.backward_flops) == tuple(unit * n for n in units)


def test_a_kernel_that_fails_gets_no_figures(monkeypatch):
    monkeypatch.setattr(bench, "check", lambda *_: {"out": ErrorRatio(1.0, 0.1, 10.0, 10.0)})
    (result,) = run_tiny(1, ["lctrain"]).results
    assert result.status == "failed_check"
    assert "failed_check" in bench.describe(
        BenchmarkRecord("x", "now", {}, {}, results=[result]), "tiny"
    )


def test_a_contender_that_breaks_leaves_the_others(monkeypatch):
    def broken(inputs):
        raise RuntimeError("out of luck\nand more")

    monkeypatch.setitem(bench.CONTENDERS, "fa4_calls", broken)
    results = run_tiny(2, ["fa4_calls", "lctrain"]).results
    assert [result.status for result in results] == ["error", "ok"]
    assert results[0].reason == "RuntimeError: out of luck"


def test_ours_runs_on_the_backend_that_is_named():
    workload = dataclasses.replace(TINY[1], backend="hopper")
    for run in (lambda: bench.check(workload, CPU), bench.ours(bench.make_inputs(workload, CPU))):
        with pytest.raises(ValueError, match="needs tensors on a Hopper GPU"):
            run()


def test_without_a_gpu_it_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["--out", str(tmp_path / "run.json")]) == 2
    assert "needs a GPU" in capsys.readouterr().err


@pytest.mark.gpu
def test_it_runs_on_a_gpu(tmp_path, capsys):
    path = tmp_path / "run.json"
    arguments = ["--workloads", "v1_mix32k,v2_mix32k", "--contenders", "lctrain,lctrain_calls"]
    assert bench.main([*arguments, "--repetitions", "1", "--out", str(path)]) == 0
    assert "ours is" in capsys.readouterr().out
    assert len(BenchmarkRecord.load(path).results) == 4
