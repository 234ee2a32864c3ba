"""Tests the benchmark of encoders on tiny models: its record, its rows, and what it refuses."""

import pytest
import torch

from lctrain.bench.__main__ import main
from lctrain.bench.encoder import CASES, EncoderCase, run_case
from lctrain_kernels.bench.record import BenchmarkRecord
from lctrain_kernels.bench.run import new_record


def test_tiny_models_are_timed_and_agree(tmp_path, capsys):
    output = tmp_path / "folder" / "encoder.json"
    options = ["--tiny", "--contenders", "lctrain,sdpa", "--milliseconds", "1"]
    assert main(["encoder", *options, "--output", str(output)]) == 0
    record = BenchmarkRecord.load(output)
    assert list(record.workloads) == ["bert_b4_s32", "modernbert_b3_s48"]
    for name, case in record.workloads.items():
        assert record.find(name, "lctrain").step_ms > 0
        assert record.find(name, "sdpa").step_ms > 0
        assert case["differences"]["sdpa"] < torch.finfo(torch.float32).eps * 100
    assert "lctrain" in capsys.readouterr().out
    assert {"transformers", "torch"} <= record.versions.keys()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_lengths_average_six_tenths(case):
    lengths = case.lengths()
    assert len(lengths) == case.rows
    assert abs(sum(lengths) - 0.6 * case.rows * case.tokens) <= case.rows  # rounded to tokens
    assert max(lengths) == case.tokens


def test_what_fails_is_recorded(monkeypatch):
    device = torch.device("cpu")
    record = new_record([], device, 1, 1)
    case = EncoderCase("bert", 2, 16, graph=True)
    run_case(record, case, ["lctrain"], device, 1, tiny=True)
    assert record.results[0].status == "error"
    assert "must run on a GPU, got cpu. Choose other --cases." in record.results[0].reason


def test_unknown_cases_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["encoder", "--cases", "bert_b1_s1"])
    assert "cases must be among bert_b64_s512, " in capsys.readouterr().err
