"""Tests the cost model: what it prints, and its limits where the answer is known."""

import dataclasses
import json

import pytest

from lctrain.bench import cost
from lctrain.bench.__main__ import main
from lctrain.bench.shapes import llama_8b, tiny
from lctrain.flops import peak_flops
from tests.numerics import near

FREE = cost.Assumptions("tiny", "H200", 0.5, 8, 1e30, 1e30, 0.0, 1024, 4096, 4)


@pytest.fixture(scope="module")
def model():
    return cost.ModelCost.of(tiny(llama_8b))


def test_the_command_prints_assumptions_and_rows(tmp_path, capsys, monkeypatch, model):
    monkeypatch.setattr(cost.ModelCost, "of", lambda shape: model)
    output = tmp_path / "cost.json"
    options = ["--context", "all", "--tokens", "512", "--output", str(output)]
    assert main(["cost", *options]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Computed, not measured. Assumed: Llama-3.1-8B in bf16 on H200, 50%")
    assert "all ranks share a pack" in printed
    assert "From 16 GPUs, the ranks that share a pack are on several machines:" in printed
    assert main(["cost", "--context", "8"]) == 0
    assert "on several machines" not in capsys.readouterr().out
    record = json.loads(output.read_text())
    assert record["assumptions"]["tokens"] == 512
    assert [row["gpus"] for row in record["rows"]] == list(cost.GPUS)
    assert [row["context"] for row in record["rows"]] == list(cost.GPUS)
    for row in record["rows"]:
        assert 0 < row["efficiency"] <= 1
        assert f"| {row['gpus']:,} |" in printed


def test_a_network_without_cost_leaves_the_balance(model):
    """Four ranks exchange heads of one document: equal work, and nothing else takes time."""
    row = cost.step_cost(model, dataclasses.replace(FREE, context=2), 8)
    assert row["heads"] == 2
    assert row["efficiency"] == near(1.0)
    flops = model.flops.step_flops([2048])
    assert row["step_seconds"] == near(flops / 2 / (peak_flops("H200") / 2))
    uneven = cost.step_cost(model, FREE, 8)  # two heads groups of two ranks gather keys
    assert uneven["heads"] == 2
    assert 0.9 < uneven["efficiency"] <= 1.0


def test_slow_links_cost_what_they_carry(model):
    """A heads group of two ranks: twice the bytes per second, half the seconds."""
    slow = dataclasses.replace(FREE, context=2, link=1e6)
    fast = dataclasses.replace(slow, link=2e6)
    seconds = [cost.step_cost(model, each, 8)["exchange_seconds"] for each in (slow, fast)]
    assert seconds[0] == near(2 * seconds[1])
    late = dataclasses.replace(FREE, context=2, latency=1.0)
    assert cost.step_cost(model, late, 8)["exchange_seconds"] == near(8 * model.layers)
    alone = dataclasses.replace(FREE, context=1, latency=1.0)
    assert cost.step_cost(model, alone, 8)["exchange_seconds"] == 0


def test_fsdp_costs_what_compute_does_not_hide(model):
    slow = dataclasses.replace(FREE, context=1, link=1e3)
    row = cost.step_cost(model, slow, 8)
    assert row["fsdp_seconds"] == near(model.parameters * 7 / 8 * (2 + 2 + 4) / 1e3)
    assert row["step_seconds"] == near(row["fsdp_seconds"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu", "X1"], "--gpu must be a GPU with a known peak, got X1"),
        (["--context", "0"], "--context must be all or a number of ranks that divides 1,024"),
        (["--context", "7"], "that divides 1,024 GPUs, got 7"),
        (["--context", "2048"], "that divides 1,024 GPUs, got 2048"),
        (["--context", "x"], "that divides 1,024 GPUs, got x"),
        (["--peak-share", "0"], "--peak-share must be in (0, 1], got 0.0"),
        (["--peak-share", "1.5"], "--peak-share must be in (0, 1], got 1.5"),
        (["--link", "0"], "--link must be above 0, and finite, got 0.0"),
        (["--link", "inf"], "--link must be above 0, and finite, got inf"),
        (["--network", "nan"], "--network must be above 0, and finite, got nan"),
        (["--latency", "-1"], "--latency must be at least 0, and finite, got -1.0"),
    ],
)
def test_bad_options(options, message, capsys):
    with pytest.raises(SystemExit):
        main(["cost", *options])
    assert message in capsys.readouterr().err
