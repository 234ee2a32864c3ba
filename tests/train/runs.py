"""Runs lctrain-train, in this process or in its own, and reads the files that it writes."""

import csv
import os
from pathlib import Path

import torch

from lctrain.config import (
    TrainConfig,
    to_dataclass,
)
from tests.configs.composed import composed
from tests.forked import run_forked

ROOT = Path(__file__).parents[2]


PYTHONPATH = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


def config(*overrides, output_dir) -> TrainConfig:
    plain = [f"paths.root={Path(output_dir).parent}", *overrides]
    return to_dataclass(composed(*plain, output_dir=output_dir), TrainConfig)


def run_command(overrides, folder, check=True):
    """Runs lctrain-train in a process of its own."""
    arguments = [*overrides, f"hydra.run.dir={folder}"]
    return run_forked("lctrain.train", *arguments, cwd=folder.parent, check=check)


def rows(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def train_losses(folder):
    """Returns each step's loss from metrics.csv, as the decimal string in the file."""
    return {row["step"]: row["train/loss"] for row in rows(folder) if row["train/loss"]}


def wandb_files(folder):
    """Returns the files of a run's W&B records, once W&B's service has written and closed them."""
    import wandb

    wandb.teardown()
    return sorted(folder.glob("wandb/offline-run-*/*.wandb"))


def weights(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=False)["state_dict"]


def assert_same_run(one, other):
    """Checks that two runs have bit-equal losses and trained weights."""
    assert train_losses(one) == train_losses(other)
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
