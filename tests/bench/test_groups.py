"""Tests lctrain-bench groups on a CPU: both ways compute the same loss."""

import json

import torch

from lctrain.bench.__main__ import main
from lctrain_kernels.bench.shared_prefix_report import shared_prefix_table
from tests.numerics import assert_equal_sums


def test_a_trial_measures_both_ways(tmp_path, capsys):
    output = tmp_path / "groups.json"
    options = ["--tiny", "--sizes", "3", "--prompt", "24", "--completion", "5", "--steps", "1"]
    assert main(["groups", *options, "--output", str(output)]) == 0
    (run,) = json.loads(output.read_text())["runs"]
    assert run["shared"]["tokens"] == 23 + 3 * 6
    assert run["separate"]["tokens"] == 3 * 29
    assert 1 < run["separate"]["flops"] / run["shared"]["flops"] < 87 / 41
    assert "3 completions  shared" in capsys.readouterr().out
    assert "Llama-3.2-1B, tiny, all weights trained, without" in shared_prefix_table(
        json.loads(output.read_text())
    )
    losses = [torch.tensor(run[name]["loss"]) for name in ("shared", "separate")]
    assert_equal_sums(*losses)


def test_the_table_names_the_adapters(tmp_path):
    output = tmp_path / "groups.json"
    options = [
        "--shape",
        "llama-8b",
        "--tiny",
        "--sizes",
        "2",
        "--prompt",
        "9",
        "--completion",
        "2",
    ]
    assert main(["groups", *options, "--steps", "1", "--output", str(output)]) == 0
    text = shared_prefix_table(json.loads(output.read_text()))
    assert "Llama-3.1-8B, tiny, LoRA of rank 16 trained, without checkpointing" in text


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["groups"]) == 2
    assert "lctrain-bench groups needs a GPU" in capsys.readouterr().err
