"""Trains the runs of an experiment on several GPUs, with one process per GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

MODULE = "lctrain.recipes.differential"


def visible_devices(environment: dict[str, str], count: int) -> list[str]:
    """Returns the value of CUDA_VISIBLE_DEVICES for each of `count` GPUs."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[:count] if visible else [str(index) for index in range(count)]


def train_in_processes(arguments: Sequence[str], devices: Sequence[str]) -> None:
    """Runs the recipe's stage `train` in one process per device, and waits for all of them.

    Args:
        arguments: Arguments of the recipe, without --stages and --share; overrides may follow "--".
        devices: Value of CUDA_VISIBLE_DEVICES for each process.

    Raises:
        RuntimeError: if a process fails; its output says why.
    """
    started = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", MODULE, "--stages", "train"),
                *("--share", f"{index}/{len(devices)}"),
                *arguments,
            ],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": device},
        )
        for index, device in enumerate(devices)
    ]
    statuses = [process.wait() for process in started]
    failed = [str(index) for index, status in enumerate(statuses) if status != 0]
    if failed:
        raise RuntimeError(f"processes that failed: {', '.join(failed)} of {len(devices)}")
