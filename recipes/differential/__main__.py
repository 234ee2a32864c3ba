"""Runs the recipe: `python -m lctrain.recipes.differential`; see the README beside this file."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from lctrain.recipes.differential.comparison import collect_runs
from lctrain.recipes.differential.experiment import Experiment
from lctrain.recipes.differential.parity import compare_kernels
from lctrain.recipes.differential.processes import train_in_processes, visible_devices
from lctrain.recipes.differential.run import prepare_data, train_runs
from lctrain.recipes.differential.scale import SCALES
from lctrain.recipes.differential.variant import VARIANTS
from lctrain.recipes.output import messages, refuse_earlier_runs
from lctrain.warn import begin_warnings

STAGES = {
    "prepare": prepare_data,
    "train": train_runs,
    "collect": collect_runs,
    "parity": compare_kernels,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the requested stages in their order."""
    begin_warnings()
    given = list(sys.argv[1:] if arguments is None else arguments)
    chosen = _parser().parse_args(given)
    experiment = Experiment(
        output=chosen.output.absolute(),
        scale=SCALES[chosen.scale],
        variants=tuple(name for name in VARIANTS if name in chosen.variants),
        seeds=tuple(sorted(set(chosen.seeds))),
        share=chosen.share or (0, 1),
        keep_models=chosen.keep_models,
        overrides=tuple(chosen.overrides),
    )
    if "train" in chosen.stages:
        refuse_earlier_runs("train", [experiment.folder(*run) for run in experiment.shared_runs])
    gpus = torch.cuda.device_count()
    for name, stage in STAGES.items():
        if name not in chosen.stages:
            continue
        print(f"== {name}", flush=True)
        if name == "train" and chosen.share is None and gpus > 1:
            devices = visible_devices(dict(os.environ), gpus)
            train_in_processes(_without_stages(chosen), devices)
        else:
            stage(experiment)


def share(text: str) -> tuple[int, int]:
    """Parses "i/n" into (i, n).

    Raises:
        argparse.ArgumentTypeError: unless 0 <= i < n.
    """
    first, _, count = text.partition("/")
    if not (first.isdigit() and count.isdigit() and int(first) < int(count)):
        raise argparse.ArgumentTypeError(
            f"share must be i/n with 0 <= i < n, got {text}. The first of two processes is 0/2."
        )
    return int(first), int(count)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lctrain.recipes.differential",
        description="Trains plain and differential models with several seeds, and compares them.",
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/differential"))
    parser.add_argument("--scale", choices=SCALES, default="full")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=list(STAGES), help="default: all of them"
    )
    parser.add_argument(
        "--share",
        type=share,
        help="i/n: train every n-th run from the i-th on, here and on one device; default: all, "
        "in a process for each visible GPU",
    )
    parser.add_argument("--keep-models", action="store_true", help="leave trained models there")
    parser.add_argument(
        "overrides", nargs="*", help="Hydra overrides of every training run, after --"
    )
    return parser


def _without_stages(chosen: argparse.Namespace) -> list[str]:
    """Returns the arguments for a process that trains some of the runs: no --stages, no --share."""
    arguments = [
        *("--output", str(chosen.output)),
        *("--scale", chosen.scale),
        *("--variants", *chosen.variants),
        *("--seeds", *map(str, chosen.seeds)),
        *(["--keep-models"] if chosen.keep_models else []),
    ]
    return [*arguments, "--", *chosen.overrides] if chosen.overrides else arguments


if __name__ == "__main__":
    with messages("python -m lctrain.recipes.differential"):
        main()
