"""Runs the recipe: `python -m lctrain.recipes.dual_chunk_extension`.

See the README beside this file.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lctrain.recipes.dual_chunk_extension.continuation import GRADIENTS, continue_training
from lctrain.recipes.dual_chunk_extension.experiment import Experiment
from lctrain.recipes.dual_chunk_extension.scale import SCALES
from lctrain.recipes.dual_chunk_extension.stages import (
    find_passkeys,
    measure_perplexity,
    train_short,
)
from lctrain.recipes.output import messages, refuse_earlier_runs
from lctrain.warn import begin_warnings

STAGES = {
    "train": train_short,
    "perplexity": measure_perplexity,
    "passkey": find_passkeys,
    "continue": continue_training,
}


FOLDERS = {
    "train": ["train"],
    "continue": [f"continued_{gradient}" for gradient in GRADIENTS],
}
"""Folders of the trainings of each stage, below that of the recipe."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the requested stages in their order."""
    begin_warnings()
    parser = argparse.ArgumentParser(
        prog="python -m lctrain.recipes.dual_chunk_extension",
        description="Trains on a short window, and reads far beyond it with dual chunk attention.",
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/dual_chunk_extension"))
    parser.add_argument("--scale", choices=SCALES, default="full")
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=list(STAGES), help="default: all of them"
    )
    parser.add_argument(
        "overrides", nargs="*", help="Hydra overrides of the first training run, after --"
    )
    chosen = parser.parse_args(arguments)
    experiment = Experiment(chosen.output.absolute(), SCALES[chosen.scale], tuple(chosen.overrides))
    for stage, names in FOLDERS.items():
        if stage in chosen.stages:
            refuse_earlier_runs(stage, [experiment.output / name for name in names])
    for name, run in STAGES.items():
        if name in chosen.stages:
            print(f"== {name}", flush=True)
            run(experiment)


if __name__ == "__main__":
    with messages("python -m lctrain.recipes.dual_chunk_extension"):
        main()
