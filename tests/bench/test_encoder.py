"""Tests the benchmark of encoders on tiny models: its record, its rows, and what it refuses."""

import sys
from types import SimpleNamespace

import pytest
import torch

import lctrain.kernels
from lctrain.bench import fa4_rows
from lctrain.bench.__main__ import main
from lctrain.bench.encoder import CASES, TINY_CASES, EncoderCase, Rows, build_fa4, run_case
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


def test_every_result_is_told_and_saved_at_once(tmp_path, monkeypatch):
    """A run that is cut short keeps what it has measured."""
    saved = []
    monkeypatch.setattr(
        BenchmarkRecord, "save", lambda self, path: saved.append([one.peer for one in self.results])
    )
    options = ["--tiny", "--contenders", "lctrain,sdpa", "--milliseconds", "1"]
    assert main(["encoder", *options, "--output", str(tmp_path / "encoder.json")]) == 0
    assert saved[:2] == [["lctrain"], ["lctrain", "sdpa"]]


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


@pytest.fixture
def fa4(monkeypatch):
    """Stands for FlashAttention-4's package; returns the lengths of its calls."""
    calls = []

    def flash_attn_varlen_func(q, k, v, *, max_seqlen_q, window_size, **options):
        calls.append(max_seqlen_q)
        left, right = (-1 if side is None else side for side in window_size)
        return lctrain.kernels.flash_attn_varlen_func(
            q, k, v, max_seqlen_q=max_seqlen_q, window_size=(left, right), **options
        )

    module = SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(cute=module))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", module)
    return calls


@pytest.mark.parametrize("case", TINY_CASES, ids=lambda case: case.name)
def test_the_peer_computes_the_same(case, fa4):
    device = torch.device("cpu")
    record = new_record([], device, 1, 1)
    run_case(record, case, ["sdpa", "fa4"], device, 1, tiny=True)
    assert [result.status for result in record.results] == ["ok", "ok"]
    difference = record.workloads[case.name]["differences"]["fa4"]
    assert difference < torch.finfo(torch.float32).eps * 100
    assert max(fa4) == case.tokens


def test_the_peer_reads_no_mask_in_a_graph(fa4, monkeypatch):
    """A CUDA graph cannot read a mask, so the places of the tokens are found before it."""
    case, device = TINY_CASES[0], torch.device("cpu")
    model = build_fa4(case, device, True)
    rows = Rows.of(case, model)
    inputs = {"input_ids": rows.input_ids, "attention_mask": rows.mask}
    expected = model(**inputs)[0]
    with fa4_rows.known_padding(rows.mask):
        monkeypatch.setattr(fa4_rows, "unpad_input", lambda *_: pytest.fail("it read a mask"))
        assert torch.equal(model(**inputs)[0], expected)
