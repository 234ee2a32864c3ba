"""Runs the differential recipe at its tiny scale, from the data to the plot."""

import csv
import json
import math
from argparse import ArgumentTypeError
from pathlib import Path

import pytest
import torch

from lctrain.build import build_model
from lctrain.recipes.differential import processes
from lctrain.recipes.differential.__main__ import main, share
from lctrain.recipes.differential.comparison import as_text, over_seeds, read_runs, summarize
from lctrain.recipes.differential.experiment import Experiment, trained_window
from lctrain.recipes.differential.scale import SCALES
from lctrain.recipes.differential.variant import VARIANTS
from tests.numerics import near

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_whole_experiment_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("LCTRAIN_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out"
    main(["--scale", "tiny", "--output", str(out), "--seeds", "0", "1"])
    content = json.loads((out / "differential.json").read_text())
    assert [run["variant"] for run in content["runs"]] == ["plain"] * 2 + ["v1"] * 2 + ["v2"] * 2
    for run in content["runs"]:
        assert run["steps"] == 3
        assert math.isfinite(run["held_out_loss"])
        assert run["largest_logit"] == max(run["largest_logit_by_layer"]) > 0
        assert len(run["largest_logit_by_layer"]) == 2
        assert 0 < run["key_loss"] < 10
        assert run["passkeys"].keys() == {"128", "256"}
        assert not (out / "runs" / f"{run['variant']}_{run['seed']}" / "model").exists()
    packings = {(run["packing"], run["held_out_packing"]) for run in content["runs"]}
    assert len(packings) == 1  # equal data
    assert content["summary"]["v1"]["held_out_loss_difference"]["standard_error"] >= 0
    with (out / "differential.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 6
    assert (out / "differential.png").read_bytes().startswith(b"\x89PNG")
    parity = json.loads((out / "parity.json").read_text())
    curves = parity["loss"]["float32"]
    curve = curves["one launch"]
    assert parity["largest_difference_to_two_calls_with_sdpa"]["float32"]["one launch"] == max(
        abs(a - b) for a, b in zip(curve, curves["two calls, sdpa"], strict=True)
    )
    assert len(curve) == 6
    assert curve[-1] < curve[0]


@pytest.mark.parametrize("scale", SCALES)
def test_the_models_have_equal_parameters(scale, tmp_path):
    experiment = Experiment(tmp_path, SCALES[scale])
    counts = {}
    for name, variant in VARIANTS.items():
        config = experiment.compose(variant, 0)
        with torch.device("meta"):
            model = build_model(config.model, config.data.vocab_size)
        counts[name] = sum(parameter.numel() for parameter in model.parameters())
        assert config.attention.name == variant.attention
    assert max(counts.values()) < 1.02 * min(counts.values())
    if scale == "full":
        assert 1.2e7 < counts["plain"] < 1.5e7


def test_the_data_do_not_depend_on_the_variant(tmp_path):
    experiment = Experiment(tmp_path, SCALES["full"])
    configs = {name: experiment.compose(variant, 1) for name, variant in VARIANTS.items()}
    assert configs["plain"].data == configs["v1"].data == configs["v2"].data
    assert configs["plain"].data.seed == configs["plain"].seed == 1
    window = configs["plain"].model.config["max_position_embeddings"]
    assert trained_window(configs["plain"]) == window == 2048
    assert configs["plain"].trainer == configs["v1"].trainer == configs["v2"].trainer
    assert configs["plain"].optim == configs["v1"].optim == configs["v2"].optim


def test_shares_hold_every_run_once(tmp_path):
    shares = [Experiment(tmp_path, SCALES["tiny"], share=(i, 2)).shared_runs for i in range(2)]
    assert [len(runs) for runs in shares] == [5, 4]
    assert {(v.name, seed) for runs in shares for v, seed in runs} == {
        (name, seed) for name in VARIANTS for seed in range(3)
    }


def test_a_share_is_one_of_some():
    assert share("1/2") == (1, 2)
    for wrong in ("2/2", "1", "a/b", "/2"):
        with pytest.raises(ArgumentTypeError, match=r"share must be i/n .* The first of two"):
            share(wrong)


def test_missing_runs_are_named(tmp_path):
    experiment = Experiment(tmp_path, SCALES["tiny"], variants=("plain",), seeds=(0, 7))
    with pytest.raises(ValueError, match=r"without plain_0, plain_7. Run the stage train"):
        read_runs(experiment)


def _record(variant, seed, loss):
    return {
        "variant": variant,
        "seed": seed,
        "parameters": 10,
        "held_out_loss": loss,
        "tokens_per_second": 5.0,
        "largest_logit": 2.0,
        "key_loss": 3.0,
        "key_loss_of_guessing": 6.93,
        "peak_memory_gib": 1.0,
        "passkeys": {"64": 0.5, "128": 0.25},
    }


def test_differences_are_of_the_same_seed():
    losses = {("plain", 0): 3.0, ("plain", 1): 2.0, ("v1", 0): 3.1, ("v1", 1): 2.1}
    summary = summarize([_record(*run, loss) for run, loss in losses.items()])
    difference = summary["v1"]["held_out_loss_difference"]
    assert difference["mean"] == near(0.1)
    assert difference["standard_error"] == near(0.0)
    assert summary["plain"]["held_out_loss"]["standard_error"] == near(0.5)
    assert "held_out_loss_difference" not in summary["plain"]
    text = as_text(summary)
    assert "+0.1000 ±0.0000" in text
    assert "keys at 128" in text
    assert "over 2 seeds" in text
    assert "guessing keys among their words is 6.93" in text


def test_one_seed_has_no_standard_error():
    assert over_seeds([2.0]) == {"mean": 2.0, "standard_error": None, "values": [2.0]}
    assert "one seed" in as_text(summarize([_record("plain", 0, 3.0)]))


def test_devices_are_those_that_are_visible():
    assert processes.visible_devices({}, 2) == ["0", "1"]
    assert processes.visible_devices({"CUDA_VISIBLE_DEVICES": "3,5,7"}, 2) == ["3", "5"]


def test_every_device_gets_a_share(tmp_path, monkeypatch):
    written = "import os, sys; open(sys.argv[-1] + os.environ['CUDA_VISIBLE_DEVICES'], 'w')"
    started = []

    def start(command, env):
        started.append(command)
        code = [processes.sys.executable, "-c", written, str(tmp_path / "device_")]
        return popen(code, env=env)

    popen = processes.subprocess.Popen
    monkeypatch.setattr(processes.subprocess, "Popen", start)
    processes.train_in_processes(["--scale", "tiny"], ["3", "5"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["device_3", "device_5"]
    for index, command in enumerate(started):
        assert command[1:] == [
            *("-m", "lctrain.recipes.differential", "--stages", "train"),
            *("--share", f"{index}/2", "--scale", "tiny"),
        ]


def test_a_process_that_fails_stops_the_recipe(monkeypatch):
    monkeypatch.setattr(processes, "MODULE", "lctrain.no_such_module")
    with pytest.raises(RuntimeError, match=r"processes that failed: 0 of 1"):
        processes.train_in_processes([], ["0"])


def test_the_readme_names_the_commands():
    readme = (ROOT / "recipes" / "differential" / "README.md").read_text()
    assert "python -m lctrain.recipes.differential --output" in readme
    assert "python -m lctrain.recipes.differential.step --out" in readme
