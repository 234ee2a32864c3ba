"""Starts the ranks of a test, each as a process that joins the others by a file."""

import os
import subprocess
import sys
from pathlib import Path

import torch.distributed as dist

from lctrain.process_group import leave_at_exit

ROOT = Path(__file__).parents[2]


def run_ranks(module: str, size: int, folder: Path, *arguments: str) -> None:
    """Runs `python -m MODULE RANK SIZE FOLDER ARGUMENTS` for every rank, and waits for all.

    Args:
        module: Dotted name of a module that calls `join`.
        size: Number of ranks.
        folder: Folder of the ranks' files.
        *arguments: Further arguments of every rank.
    """
    command = [sys.executable, "-W", "ignore", "-m", module]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NODE_RANK": "0"}
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(size), str(folder), *arguments],
            cwd=ROOT,
            # Lightning takes a process with LOCAL_RANK for one that a launcher has started.
            env=environment | {"LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    outputs = [process.communicate()[0] for process in processes]
    for rank, process in enumerate(processes):
        assert process.returncode == 0, f"rank {rank}: {outputs[rank]}"


def join() -> tuple[int, int, Path, list[str]]:
    """Joins the other ranks, and returns rank, size, folder and the further arguments."""
    rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    leave_at_exit()
    store = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    return rank, size, folder, sys.argv[4:]
