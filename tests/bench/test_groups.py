"""Tests lctrain-bench groups on a CPU: both ways compute the same loss."""

import json

import torch

from lctrain.bench.__main__ import main
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
    losses = [torch.tensor(run[name]["loss"]) for name in ("shared", "separate")]
    assert_equal_sums(*losses)


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["groups"]) == 2
    assert "lctrain-bench groups needs a GPU" in capsys.readouterr().err
