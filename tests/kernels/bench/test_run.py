"""Runs the whole benchmark on tiny CPU tensors, with a fake clock."""

import dataclasses

import pytest
import torch

from lctrain_kernels.bench import run
from lctrain_kernels.bench.accuracy import ErrorRatio
from lctrain_kernels.bench.check import check_ours, scale_down
from lctrain_kernels.bench.inputs import make_inputs
from lctrain_kernels.bench.peers import PEERS, Peer, UnsupportedWorkload, installed_version
from lctrain_kernels.bench.workloads import WORKLOADS

CPU = torch.device("cpu")


def timed_once(call):
    call()
    return 2.0


def run_tiny(workload, peers, **options):
    record = run.new_record(peers, CPU, repetitions=2, milliseconds=1)
    names = list(run.run_workloads(record, [workload], peers, CPU, timed_once, **options))
    assert names == ["tiny"]
    return record


def broken(inputs):
    raise RuntimeError("out of luck\nand more")


def refusing(inputs):
    raise UnsupportedWorkload("only on Tuesdays")


def other(name, prepare):
    return Peer(name, name, "torch", "torch", prepare)


def test_results_hold_times_and_speeds(tiny_workload):
    record = run_tiny(tiny_workload, [PEERS["lctrain"]], repetitions=2, check=True)
    (result,) = record.results
    assert result.status == "ok"
    assert (result.forward_ms, result.backward_ms) == (2.0, 2.0)
    assert result.forward_tflops == tiny_workload.forward_flops / 2.0 / 1e9
    assert set(result.error_ratios) == {"out", "dq", "dk", "dv"}
    assert record.workloads["tiny"]["lengths"] == (13, 1, 20)
    assert record.versions["torch"] == torch.__version__


def test_one_peer_that_fails_leaves_the_others(tiny_workload):
    peers = [other("broken", broken), other("refusing", refusing), PEERS["lctrain"]]
    results = run_tiny(tiny_workload, peers).results
    assert [result.status for result in results] == ["error", "unsupported", "ok"]
    assert results[0].reason == "RuntimeError: out of luck"
    assert results[1].reason == "only on Tuesdays"


def test_a_kernel_that_fails_its_check_gets_no_figures(tiny_workload, monkeypatch):
    bad = {"out": ErrorRatio(1.0, 0.1, 10.0, 1.0)}
    monkeypatch.setattr(run, "check_ours", lambda workload, device: bad)
    (result,) = run_tiny(tiny_workload, [PEERS["lctrain"]], check=True).results
    assert result.status == "failed_check"
    assert result.forward_ms is None
    assert result.error_ratios == {"out": 10.0}


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_check_judges_output_and_gradients(tiny_workload, dropout_p):
    workload = dataclasses.replace(tiny_workload, dropout_p=dropout_p)
    ratios = check_ours(workload, CPU)
    assert set(ratios) == {"out", "dq", "dk", "dv"}
    assert all(ratio.passes for ratio in ratios.values()), ratios


@pytest.mark.parametrize("name", sorted(WORKLOADS))
def test_scaled_down_workloads_fit_a_dense_reference(name):
    scaled = scale_down(WORKLOADS[name])
    assert 0 < scaled.tokens <= 8192
    assert max(scaled.lengths) <= 2048


def test_inputs_are_the_same_every_time(tiny_workload):
    first, second = make_inputs(tiny_workload, CPU), make_inputs(tiny_workload, CPU)
    assert torch.equal(first.k, second.k)
    assert first.cu_seqlens.tolist() == [0, 13, 14, 34]
    assert first.cu_seqlens.dtype == torch.int32
    assert first.max_seqlen == 20


def test_peers_say_what_they_cannot_do(tiny_workload):
    with pytest.raises(UnsupportedWorkload, match="one length only"):
        PEERS["cudnn"].prepare(make_inputs(tiny_workload, CPU))
    with_dropout = make_inputs(dataclasses.replace(tiny_workload, dropout_p=0.1), CPU)
    for name in ("cudnn", "fa4", "fla", "flex"):
        with pytest.raises(UnsupportedWorkload, match="has no dropout"):
            PEERS[name].prepare(with_dropout)


def test_a_peer_that_is_not_installed_is_missing():
    peer = Peer("x", "X", "no_such_module_at_all", "no-such-distribution", broken)
    assert "ModuleNotFoundError" in peer.missing()
    assert installed_version("no-such-distribution") is None
    assert PEERS["lctrain"].missing() is None
