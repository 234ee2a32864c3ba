"""Runs the recipe: `python -m lctrain.recipes.smollm2 FOLDER`; see the README beside this file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lctrain.recipes.output import messages
from lctrain.recipes.smollm2.continuation import continue_training
from lctrain.recipes.smollm2.experiment import Experiment
from lctrain.recipes.smollm2.scale import SCALES
from lctrain.recipes.smollm2.stages import (
    find_needles,
    find_needles_beyond,
    measure_beyond,
    measure_gain,
    run_ruler,
)
from lctrain.warn import begin_warnings

PROGRAM = "python -m lctrain.recipes.smollm2"
STAGES = {
    "gain": measure_gain,
    "beyond": measure_beyond,
    "continue": continue_training,
    "needle": find_needles,
    "needle_beyond": find_needles_beyond,
    "ruler": run_ruler,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the requested stages in their order. A stage that was stopped goes on."""
    begin_warnings()
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Measures how SmolLM2-135M-Instruct uses its context, and what extends it.",
    )
    parser.add_argument("folder", type=Path, help="folder that the command fetch wrote")
    parser.add_argument("--output", type=Path, default=Path("outputs/smollm2"))
    parser.add_argument("--scale", choices=SCALES, default="full")
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=list(STAGES), help="default: all of them"
    )
    parser.add_argument(
        "--overrides", nargs="+", default=[], help="Hydra overrides of the continued training"
    )
    chosen = parser.parse_args(arguments)
    experiment = Experiment(
        chosen.folder.absolute(),
        chosen.output.absolute(),
        SCALES[chosen.scale],
        tuple(chosen.overrides),
    )
    for name, run in STAGES.items():
        if name in chosen.stages:
            print(f"== {name}", flush=True)
            run(experiment)


if __name__ == "__main__":
    with messages(PROGRAM):
        main()
