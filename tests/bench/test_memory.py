"""Tests the benchmark of memory on a tiny model: its record, and the plan beside it."""

import json

import pytest

from lctrain.bench.__main__ import main


def run(tmp_path, *options):
    output = tmp_path / "folder" / "memory.json"
    assert main(["memory", *options, "--host-gib", "1", "--output", str(output)]) == 0
    return json.loads(output.read_text())


def test_a_tiny_model_is_measured_under_every_policy(tmp_path, capsys):
    policies = ["none", "checkpoint", "offload", "auto"]
    options = ("--tiny", "--layers", "4", "--tokens", "64", "--steps", "1", "--rank", "2")
    record = run(tmp_path, *options, "--policies", ",".join(policies))
    runs = record["runs"]
    assert [(run["policy"], run["tokens"], run["status"]) for run in runs] == [
        (policy, 64, "ok") for policy in policies
    ]
    assert len({run["loss"] for run in runs}) == 1  # the same steps of the same model
    by_policy = {run["policy"]: run for run in runs}
    assert by_policy["offload"]["host_gib"] == by_policy["offload"]["planned_host_gib"]
    assert by_policy["offload"]["layers"] == ["host/recompute"] * 2 + ["device/recompute"] * 2
    assert by_policy["auto"]["planned_policy"] == "none"  # everything fits
    assert record["layers"] == 4
    assert "tokens/s" in capsys.readouterr().out


def test_plans_need_no_gpu_and_no_memory(tmp_path):
    options = ("--plan-only", "--layers", "2", "--device-gib", "20", "--tokens", "8192,16384")
    short, long = run(tmp_path, *options, "--policies", "offload")["runs"]
    assert short["status"] == "planned"
    assert short["planned_gib"] < long["planned_gib"]
    assert short["planned_longest"] > 0


def test_a_gpu_is_needed_otherwise(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["memory", "--output", str(tmp_path / "x.json")]) == 2
    assert "needs a GPU" in capsys.readouterr().err


def test_unknown_policies_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["memory", "--policies", "all"])
    assert "policies must be among none, checkpoint, offload, auto" in capsys.readouterr().err
