"""Sweeps the learning rate of each variant: `python -m lctrain.recipes.differential.sweep`.

See the README beside this file. Every rate is an experiment of its own below the output folder, and
every run writes its record. A sweep that was stopped goes on with the runs that have no record.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lctrain.limits import require
from lctrain.pluralize import pluralize
from lctrain.recipes.differential.__main__ import share
from lctrain.recipes.differential.best_rate import as_markdown, summarize_rates
from lctrain.recipes.differential.comparison import read_run
from lctrain.recipes.differential.experiment import Experiment, write_json
from lctrain.recipes.differential.run import prepare_data, train_runs
from lctrain.recipes.differential.scale import SCALES
from lctrain.recipes.differential.variant import VARIANTS
from lctrain.recipes.output import messages, remove_stopped, require_same_settings
from lctrain.warn import begin_warnings

PROGRAM = "python -m lctrain.recipes.differential.sweep"
RESULTS = Path(__file__).parent / "results" / "sweep.json"
README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- sweep tables: begin -->", "<!-- sweep tables: end -->"


@dataclass(frozen=True)
class Sweep:
    """An experiment at several learning rates.

    Attributes:
        experiment: The experiment, without a learning rate; its share is a share of all runs.
        rates: Peak learning rates, rising.
    """

    experiment: Experiment
    rates: tuple[float, ...]

    @property
    def runs(self) -> list[tuple[float, Experiment]]:
        """All runs: the rate, and an experiment of one variant and one seed."""
        first, step = self.experiment.share
        found = [
            (rate, replace(self.at(rate), variants=(variant.name,), seeds=(seed,)))
            for variant, seed in self.experiment.runs
            for rate in self.rates
        ]
        return found[first::step]

    def at(self, rate: float) -> Experiment:
        """Returns the experiment at one rate."""
        return replace(
            self.experiment,
            output=self.experiment.output / f"rate_{rate:g}",
            overrides=(*self.experiment.overrides, f"optim.learning_rate={rate}"),
            share=(0, 1),
        )

    def train(self) -> None:
        """Trains the runs of this process that have no record."""
        for _, run in self.runs:
            if not run.record(*run.runs[0]).is_file():
                remove_stopped(run.folder(*run.runs[0]))
                train_runs(run)

    def collect(self) -> dict[str, Any]:
        """Returns the summary of all records, writes sweep.json and prints the tables.

        Raises:
            ValueError: if there is no record at all.
        """
        whole = replace(self, experiment=replace(self.experiment, share=(0, 1)))
        found, missing = [], []
        for rate, run in whole.runs:
            path = run.record(*run.runs[0])
            if path.is_file():
                found.append({**read_run(path), "learning_rate": rate})
            else:
                missing.append(f"{path.stem} at {rate:g}")
        require(
            bool(found),
            f"output must hold at least one run, got {self.experiment.output}. Run the stage "
            "train first.",
        )
        summary = {**summarize_rates(found), "missing": missing, "runs": found}
        write_json(self.experiment.output / "sweep.json", summary)
        print(as_markdown(summary))
        if missing:
            print(f"without a record: {', '.join(missing)}")
        return summary


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the requested stages in their order."""
    begin_warnings()
    chosen = _parser().parse_args(arguments)
    for rate in chosen.rates:
        require(rate > 0, f"--rates must be positive, got {rate:g}. Try 0.001.")
    experiment = Experiment(
        output=chosen.output.absolute(),
        scale=SCALES[chosen.scale],
        variants=tuple(name for name in VARIANTS if name in chosen.variants),
        seeds=tuple(sorted(set(chosen.seeds))),
        share=chosen.share or (0, 1),
        overrides=tuple(chosen.overrides),
    )
    sweep = Sweep(experiment, tuple(sorted(set(chosen.rates))))
    if {"train", "collect"} & {*chosen.stages}:
        settings = {"scale": chosen.scale, "overrides": chosen.overrides}
        require_same_settings(experiment.output, settings)
    if "prepare" in chosen.stages:
        prepare_data(experiment)
    if "train" in chosen.stages:
        sweep.train()
    if "collect" in chosen.stages:
        sweep.collect()
    if "readme" in chosen.stages:
        write_readme()


def tables() -> str:
    """Returns the tables of the recorded sweep as Markdown, between the marks of the README."""
    if not RESULTS.exists():
        return f"{BEGIN}\n\nThe sweep has no record yet.\n\n{END}"
    summary = json.loads(RESULTS.read_text())
    return f"{BEGIN}\n\n{origin(summary)}\n\n{as_markdown(summary)}\n\n{END}"


def origin(summary: dict[str, Any]) -> str:
    """Returns how large the models were, and where and when they were trained, as a sentence."""
    run, runs = summary["runs"][0], summary["runs"]
    parameters = sum(one["parameters"] for one in runs) / len(runs)
    seeds = len({one["seed"] for one in runs})
    found = (
        f"Models of {parameters / 1e6:.1f} million parameters, {run['steps']:,} steps, "
        f"{pluralize(seeds, 'seed')}. {run['device']}, torch {run['torch']}, {run['date']}."
    )
    missing = summary["missing"]
    return f"{found} Not trained: {', '.join(missing)}." if missing else found


def write_readme() -> None:
    """Writes the tables of the recorded sweep into the README."""
    text = README.read_text()
    README.write_text(text.partition(BEGIN)[0] + tables() + text.partition(END)[2])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="Trains each variant at several learning rates, and compares."
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/differential_sweep"))
    parser.add_argument("--scale", choices=SCALES, default="small")
    parser.add_argument("--rates", nargs="+", type=float, default=[5e-4, 1e-3, 2e-3])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--share", type=share, help="i/n: train every n-th run from the i-th on")
    parser.add_argument(
        "--stages",
        nargs="+",
        choices=("prepare", "train", "collect", "readme"),
        default=["prepare", "train", "collect"],
        help="default: all but readme, which writes the tables of results/ into the README",
    )
    parser.add_argument("overrides", nargs="*", help="Hydra overrides of every run, after --")
    return parser


if __name__ == "__main__":
    with messages(PROGRAM):
        main()
