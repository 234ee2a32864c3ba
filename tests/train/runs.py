"""Runs of lctrain-train, in this process or their own, and the files that they write."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import torch

from lctrain.config import (
    TrainConfig,
    to_dataclass,
)
from tests.configs.composed import composed

ROOT = Path(__file__).parents[2]


PYTHONPATH = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


def config(*overrides, output_dir) -> TrainConfig:
    plain = [f"paths.root={Path(output_dir).parent}", *overrides]
    return to_dataclass(composed(*plain, output_dir=output_dir), TrainConfig)


def run_command(overrides, folder, check=True):
    """Runs the command in its own process."""
    return subprocess.run(
        [sys.executable, "-m", "lctrain.train", *overrides, f"hydra.run.dir={folder}"],
        cwd=folder.parent,
        env=os.environ | {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=check,
        timeout=300,
    )


def rows(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def train_losses(folder):
    """Returns {step: loss} as the decimal strings of the file."""
    return {row["step"]: row["train/loss"] for row in rows(folder) if row["train/loss"]}


def weights(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=False)["state_dict"]


def assert_same_run(one, other):
    """Checks that losses and trained weights are equal in every bit."""
    assert train_losses(one) == train_losses(other)
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
