"""Runs the recipe: `python -m lctrain.recipes.post_training`; see the README beside this file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lctrain.recipes.output import messages, refuse_earlier_runs
from lctrain.recipes.post_training.dpo import train_dpo
from lctrain.recipes.post_training.experiment import Experiment
from lctrain.recipes.post_training.grpo import train_grpo
from lctrain.recipes.post_training.runs import recorded_runs
from lctrain.recipes.post_training.scale import SCALES
from lctrain.recipes.post_training.sft import train_sft
from lctrain.warn import begin_warnings

STAGES = {"sft": train_sft, "dpo": train_dpo, "grpo": train_grpo}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the requested stages in their order."""
    begin_warnings()
    parser = argparse.ArgumentParser(
        prog="python -m lctrain.recipes.post_training",
        description="Trains a small model on conversations, on preference pairs and with rewards.",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("outputs/post_training"),
        help="folder of the records and runs; default: outputs/post_training",
    )
    parser.add_argument(
        "--scale",
        choices=SCALES,
        default="full",
        help="tiny checks the code in seconds; default: full",
    )
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        default=[0, 1, 2],
        help="one run of DPO and GRPO each, SFT takes the first; default: 0 1 2",
    )
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=list(STAGES), help="default: all of them"
    )
    parser.add_argument("overrides", nargs="*", help="Hydra overrides of every run, after --")
    chosen = parser.parse_args(arguments)
    experiment = Experiment(
        output=chosen.output.absolute(),
        scale=SCALES[chosen.scale],
        seeds=tuple(sorted(set(chosen.seeds))),
        overrides=tuple(chosen.overrides),
    )
    for name in STAGES:
        if name in chosen.stages:
            experiment.compose(name, experiment.seeds[0])  # refuses overrides before any stage
            if name == "sft":
                refuse_earlier_runs(name, [experiment.output], record="sft.json")
            else:
                recorded_runs(experiment, name)
    for name, run in STAGES.items():
        if name in chosen.stages:
            print(f"== {name}", flush=True)
            run(experiment)


if __name__ == "__main__":
    with messages("python -m lctrain.recipes.post_training"):
        main()
