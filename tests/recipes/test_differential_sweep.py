"""Tests the sweep of the learning rate: its runs, the best rates, and what the differences say."""

import json
import math

import pytest

from lctrain.recipes.differential import sweep
from lctrain.recipes.differential.best_rate import PARITY, as_markdown, summarize_rates, verdict
from lctrain.recipes.differential.comparison import read_run
from lctrain.recipes.differential.experiment import write_json
from tests.numerics import near

LOSSES = {
    ("plain", 1e-3): (3.0, 2.9, 3.1),
    ("plain", 2e-3): (2.5, 2.4, 2.6),
    ("plain", 4e-3): (4.0, 4.0, 4.0),
    ("v1", 1e-3): (2.51, 2.41, 2.62),
    ("v1", 2e-3): (2.7, 2.7, 2.7),
    ("v2", 2e-3): (2.2, 2.1, 2.31),
    ("v2", 4e-3): (2.1, 2.1, 1.9),
}


def record(variant, seed, rate, loss):
    return {
        "variant": variant,
        "seed": seed,
        "learning_rate": rate,
        "held_out_loss": loss,
        "largest_logit": 10.0 + seed,
    }


RUNS = [
    record(variant, seed, rate, loss)
    for (variant, rate), losses in LOSSES.items()
    for seed, loss in enumerate(losses)
]


def test_every_variant_is_compared_at_its_own_best_rate():
    best = summarize_rates(RUNS[::-1])["best"]
    assert {name: row["rate"] for name, row in best.items()} == {
        "plain": 2e-3,
        "v1": 1e-3,
        "v2": 4e-3,
    }
    assert {name: row["at_the_edge"] for name, row in best.items()} == {
        "plain": False,
        "v1": True,
        "v2": True,
    }
    assert best["v1"]["minus_plain"]["values"] == near([0.01, 0.01, 0.02])
    assert "minus_plain" not in best["plain"]


def test_rates_within_a_standard_error_of_the_best_one_are_compared_too():
    spread = {1e-3: (2.0, 2.2, 2.4), 2e-3: (2.1, 1.8, 2.6), 4e-3: (2.5, 2.5, 2.5)}
    runs = [run for run in RUNS if run["variant"] == "plain"]
    runs += [
        record("v1", seed, rate, loss)
        for rate, losses in spread.items()
        for seed, loss in enumerate(losses)
    ]
    summary = summarize_rates(runs)
    best = summary["best"]["v1"]
    assert best["rate"] == 2e-3  # 2.167 with an error of 0.233; 2.2 and not 2.5 lie within
    (other,) = best["as_good"]
    assert other["rate"] == 1e-3
    assert len(other["minus_plain"]["values"]) == 3
    assert "| v1, as good | 0.001 |" in as_markdown(summary)
    assert "as_good" not in summary["best"]["plain"]


def test_a_rate_with_fewer_seeds_is_not_the_best():
    lucky = record("plain", 0, 3e-3, 1.0)
    assert summarize_rates([*RUNS, lucky])["best"]["plain"]["rate"] == 2e-3


@pytest.mark.parametrize("loss", [math.nan, math.inf])
@pytest.mark.parametrize("rate", [5e-4, 8e-3], ids=["first", "last"])
def test_a_rate_at_which_a_run_diverged_is_not_the_best(rate, loss):
    diverged = [record("plain", seed, rate, 1.0 if seed else loss) for seed in range(3)]
    summary = summarize_rates([*RUNS, *diverged])
    assert summary["best"]["plain"]["rate"] == 2e-3
    assert as_markdown(summary)


def test_the_results_of_a_diverged_run_are_read_back_as_nan(tmp_path):
    written = {**record("plain", 0, 1e-3, math.nan), "key_loss": math.inf, "passkeys": {"64": 0.5}}
    write_json(tmp_path / "plain_0.json", written)
    run = read_run(tmp_path / "plain_0.json")
    assert math.isnan(run["held_out_loss"])
    assert math.isnan(run["key_loss"])
    assert (run["largest_logit"], run["passkeys"]) == (10.0, {"64": 0.5})


def test_the_interval_is_students_over_the_seeds():
    (low, high) = summarize_rates(RUNS)["best"]["v1"]["minus_plain"]["interval"]
    mean, error = 0.04 / 3, 0.01 / 3  # the values are 0.01, 0.01 and 0.02
    assert [low, high] == near([mean - 4.303 * error, mean + 4.303 * error])


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (-PARITY, PARITY, "the losses agree"),
        (0.001, 0.02, "the losses agree"),  # they differ by less than counts
        (0.001, 0.05, "the losses differ"),
        (-0.5, -0.1, "the losses differ"),
        (-0.01, 0.05, "too few seeds to tell"),
    ],
)
def test_what_an_interval_says(low, high, expected):
    assert verdict(low, high) == expected


def test_more_seeds_than_the_table_holds_do_not_narrow_the_quantile():
    runs = [record("plain", seed, 1e-3, 3.0) for seed in range(10)]
    runs += [record("v1", seed, 1e-3, 3.0 + 0.1 * (seed % 2)) for seed in range(10)]
    difference = summarize_rates(runs)["best"]["v1"]["minus_plain"]
    low, high = difference["interval"]
    assert (high - low) / 2 == near(2.306 * difference["standard_error"])


def test_one_seed_says_nothing():
    runs = [run for run in RUNS if run["seed"] == 0]
    difference = summarize_rates(runs)["best"]["v1"]["minus_plain"]
    assert difference["interval"] is None
    assert difference["verdict"] == "one seed says nothing"


def test_the_tables_have_a_row_for_each_variant():
    lines = as_markdown(summarize_rates(RUNS)).splitlines()
    assert lines[0] == "| held-out loss | 0.001 | 0.002 | 0.004 |"
    assert "| v2 |  | 2.203 ± 0.061 | 2.033 ± 0.067 |" in lines
    assert "| plain | 0.002 | 11 ± 1 | | | |" in lines
    (v2,) = (line for line in lines if line.startswith("| v2 | 0.004"))
    assert v2.startswith("| v2 | 0.004 (the edge) | 11 ± 1 | -0.467 |")


@pytest.fixture
def trained(monkeypatch):
    """Returns a list of the trained (rate, variant, seed); records are written without training."""
    found = []

    def train_runs(experiment):
        ((variant, seed),) = experiment.shared_runs
        config = experiment.compose(variant, seed)
        rate = config.optim.learning_rate
        found.append((rate, variant.name, seed))
        content = record(variant.name, seed, None, 2.0 + rate + seed)
        experiment.folder(variant, seed).mkdir(parents=True)
        experiment.record(variant, seed).write_text(json.dumps(content))

    monkeypatch.setattr(sweep, "train_runs", train_runs)
    monkeypatch.setattr(sweep, "prepare_data", lambda experiment: None)
    return found


def run(out, *more):
    options = ["--scale", "tiny", "--rates", "2e-3", "1e-3", "--seeds", "0", "1"]
    sweep.main(["--output", str(out), *options, "--variants", "plain", "v1", *more])


def test_a_sweep_trains_each_run_once(tmp_path, trained, capsys):
    run(tmp_path)
    assert sorted(trained) == [
        (rate, variant, seed)
        for rate in (1e-3, 2e-3)
        for variant in ("plain", "v1")
        for seed in (0, 1)
    ]
    content = json.loads((tmp_path / "sweep.json").read_text())
    assert content["missing"] == []
    assert len(content["runs"]) == 8
    assert content["best"]["v1"]["rate"] == 1e-3
    (tmp_path / "rate_0.001" / "runs" / "v1_1.json").unlink()  # a run that was stopped
    run(tmp_path)
    assert trained[8:] == [(1e-3, "v1", 1)]


def test_shares_train_every_run_once_and_missing_runs_are_named(tmp_path, trained, capsys):
    run(tmp_path, "--share", "1/2", "--stages", "train", "collect")
    assert len(trained) == 4
    assert "without a record: " in capsys.readouterr().out
    assert len(json.loads((tmp_path / "sweep.json").read_text())["missing"]) == 4
    run(tmp_path, "--share", "0/2", "--stages", "train", "collect")
    assert len(set(trained)) == len(trained) == 8


def test_bad_input_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"--rates must be positive, got -1. Try 0.001"):
        run(tmp_path, "--rates", "-1")
    with pytest.raises(ValueError, match=r"must hold at least one run, got .* Run the stage train"):
        run(tmp_path, "--stages", "collect")
    with pytest.raises(ValueError, match=r"had scale=tiny and not full\. Choose another folder"):
        run(tmp_path, "--scale", "full")
    with pytest.raises(ValueError, match=r"had overrides=\[\] and not \['a=1'\]\. Choose another"):
        run(tmp_path, "--seeds", "0", "--", "a=1")


def test_the_table_says_where_and_how_the_models_were_trained(tmp_path, monkeypatch):
    facts = {"device": "GPU X", "torch": "2.11", "date": "2026-12-01", "steps": 1300}
    diverged = [record("plain", seed, 8e-3, math.nan) for seed in range(3)]
    runs = [{**run, **facts, "parameters": 4_123_456} for run in [*RUNS, *diverged]]
    summary = {**summarize_rates(runs), "missing": ["v2_2 at 0.001"], "runs": runs}
    path = tmp_path / "sweep.json"
    write_json(path, summary)
    monkeypatch.setattr(sweep, "RESULTS", path)
    text = sweep.tables()
    assert "Models of 4.1 million parameters, 1,300 steps, 3 seeds." in text
    assert "GPU X, torch 2.11, 2026-12-01. Not trained: v2_2 at 0.001." in text
    assert "| held-out loss | 0.001 | 0.002 | 0.004 | 0.008 |" in text
    assert "| plain | 3.000 ± 0.058 | 2.500 ± 0.058 | 4.000 ± 0.000 | nan |" in text


def test_the_readme_has_the_table_of_the_record():
    assert sweep.tables() in sweep.README.read_text()
    assert sweep.PROGRAM in sweep.README.read_text()
