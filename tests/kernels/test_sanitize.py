"""Tests the program that runs every kernel under compute-sanitizer, where no sanitizer is."""

import torch

from tests.kernels import sanitize
from tests.kernels.cases import GPU_CASES, GPU_DUAL_CHUNK_CASES
from tests.kernels.differential.cases import GPU_CASES as DIFFERENTIAL_CASES


def test_kernels_run_and_results_are_finite(device, capsys):
    assert sanitize.main(["sampling"], str(device)) == 0
    name, found = next(sanitize.GROUPS["decode"](str(device)))
    assert found["out"].isfinite().all()
    assert name
    assert capsys.readouterr().out.count("ran") == len([*sanitize.sampling_results(str(device))])


def test_a_result_that_is_not_finite_is_an_error(monkeypatch, capsys):
    def broken(device):
        yield "one", {"lse": torch.tensor(float("-inf")), "out": torch.tensor(float("nan"))}

    monkeypatch.setitem(sanitize.GROUPS, "sampling", broken)
    assert sanitize.main(["sampling"], "cpu") == 1
    assert "sampling one: out is not finite" in capsys.readouterr().out


def test_cases_exist():
    assert set(sanitize.NAMES) <= set(GPU_CASES)
    assert {*sanitize.DUAL_CHUNK_NAMES, *sanitize.HOPPER_DUAL_CHUNK_NAMES} <= set(
        GPU_DUAL_CHUNK_CASES
    )
    assert {*sanitize.DIFFERENTIAL_NAMES, *sanitize.HOPPER_DIFFERENTIAL_NAMES} <= set(
        DIFFERENTIAL_CASES
    )
