"""Starts the ranks of a test, each as a process that joins the others by a file."""

import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from lctrain.process_group import leave_at_exit

ROOT = Path(__file__).parents[2]
LIMIT_S = 900  # ranks that wait for each other for ever end after it


def run_ranks(module: str, size: int, folder: Path, *arguments: str) -> None:
    """Runs `python -m MODULE RANK SIZE FOLDER ARGUMENTS` for every rank, and waits for all.

    If a rank fails, the others are ended, since they would wait for it.

    Args:
        module: Dotted name of a module that calls `join`.
        size: Number of ranks.
        folder: Folder of the ranks' files.
        *arguments: Further arguments of every rank.
    """
    command = [sys.executable, "-W", "ignore", "-m", module]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NODE_RANK": "0"}
    outputs = [folder / f"rank_{rank}.txt" for rank in range(size)]
    processes = []
    for rank, path in enumerate(outputs):
        with path.open("w") as output:
            started = subprocess.Popen(
                [*command, str(rank), str(size), str(folder), *arguments],
                cwd=ROOT,
                # Lightning takes a process with LOCAL_RANK for one that a launcher has started.
                env=environment | {"LOCAL_RANK": str(rank)},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        processes.append(started)
    failed = _wait(processes)
    assert not failed, "\n".join(f"rank {rank}: {outputs[rank].read_text()}" for rank in failed)


def _wait(processes: list[subprocess.Popen]) -> list[int]:
    """Waits for processes, and returns the numbers of those that failed or had to be ended."""
    last = time.monotonic() + LIMIT_S
    try:
        while (running := [p for p in processes if p.poll() is None]) and time.monotonic() < last:
            if failed := [rank for rank, p in enumerate(processes) if p.returncode]:
                return failed
            time.sleep(0.05)
        return [rank for rank, p in enumerate(processes) if p in running or p.returncode]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def join(backend: str = "gloo") -> tuple[int, int, Path, list[str]]:
    """Joins the other ranks, and returns rank, size, folder and the further arguments.

    Args:
        backend: Backend of torch.distributed.
    """
    rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    leave_at_exit()
    store = f"file://{folder}/rendezvous"
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=size)
    return rank, size, folder, sys.argv[4:]


def fork_ranks(main: Callable[[int, int, Path], None], size: int, folder: Path) -> None:
    """Runs `main(rank, size, folder)` in a forked process per rank, and exits like the worst one.

    The ranks share what this process has imported. Call it before threads or devices are in use.

    Args:
        main: Function of a rank, which has joined the others.
        size: Number of ranks.
        folder: Folder of the ranks' files.
    """
    children = {}
    for rank in range(size):
        if (child := os.fork()) == 0:
            os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
            store = f"file://{folder}/rendezvous"
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
            try:
                main(rank, size, folder)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
            os._exit(0)
        children[child] = rank
    while children:
        child, status = os.wait()
        children.pop(child)
        if status:
            for other in children:
                os.kill(other, signal.SIGKILL)
            for other in children:
                os.waitpid(other, 0)
            sys.exit(1)
