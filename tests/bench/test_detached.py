"""Tests lctrain-bench detached: exact with the gradient of the log-sum-exp, wrong without it."""

import json

import pytest
import torch

from lctrain.bench import detached
from lctrain.bench.__main__ import main
from lctrain_kernels.bench.newest import newest_record
from tests.numerics import FAR, assert_equal_in_float64

LENGTHS = (24, 3, 9)


def test_both_calls_are_exact_in_float64():
    tensors = torch.randn(3, 24 + 27, 4, 64, dtype=torch.float64).unbind()
    assert_equal_in_float64(
        detached.attend(*tensors, LENGTHS, detach=False),
        detached.attend_separately(*tensors, LENGTHS),
    )


def test_a_detached_log_sum_exp_spoils_dq_and_dk_only():
    found = detached.measure(LENGTHS, 1)
    assert max(found["differentiable"].values()) < FAR
    wrong = found["detached"]
    assert min(wrong["dq"], wrong["dk"]) > 10 * FAR
    assert max(wrong["out"], wrong["dv"]) < FAR


def test_the_record_is_what_the_command_measures(tmp_path, capsys):
    """The figures of the documents follow from the code, on any machine."""
    record = newest_record("detached")
    output = tmp_path / "detached.json"
    assert main(["detached", "--output", str(output)]) == 0
    measured = json.loads(output.read_text())["errors"]
    for deviation, errors in record["errors"].items():
        for name, value in errors["detached"].items():
            assert abs(measured[deviation]["detached"][name] - value) < FAR
    assert "| detached | 1 |" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--prompt", "--completions", "--length"])
def test_sizes_are_positive(option, capsys):
    with pytest.raises(SystemExit):
        main(["detached", option, "0"])
    assert option in capsys.readouterr().err
