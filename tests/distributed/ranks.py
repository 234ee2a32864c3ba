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
    ranks = StartedRanks(module, size, folder, *arguments)
    last = time.monotonic() + LIMIT_S
    try:
        while ranks.are_running() and time.monotonic() < last:
            time.sleep(0.05)
    finally:
        failed = ranks.end()
    assert not failed, "\n".join(
        f"rank {rank}: {ranks.outputs[rank].read_text()}" for rank in failed
    )


class StartedRanks:
    """The ranks of a module, each a process, which writes its output into FOLDER/rank_RANK.txt.

    Args:
        module: Dotted name of a module that calls `join`.
        size: Number of ranks.
        folder: Folder of the ranks' files.
        *arguments: Further arguments of every rank.
    """

    def __init__(self, module: str, size: int, folder: Path, *arguments: str) -> None:
        command = [sys.executable, "-W", "ignore", "-m", module]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "NODE_RANK": "0"}
        self.outputs = [folder / f"rank_{rank}.txt" for rank in range(size)]
        self.processes = []
        for rank, path in enumerate(self.outputs):
            with path.open("w") as output:
                started = subprocess.Popen(
                    [*command, str(rank), str(size), str(folder), *arguments],
                    cwd=ROOT,
                    # Lightning takes a process with LOCAL_RANK for one that a launcher has started.
                    env=environment | {"LOCAL_RANK": str(rank)},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            self.processes.append(started)

    def are_running(self) -> bool:
        """Returns whether ranks run, and none of them has failed."""
        codes = [process.poll() for process in self.processes]
        return None in codes and not any(codes)

    def end(self) -> list[int]:
        """Ends the ranks that run, and returns those that had failed, or else those it ended."""
        codes = [process.poll() for process in self.processes]
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()
        failed = [rank for rank, code in enumerate(codes) if code]
        return failed or [rank for rank, code in enumerate(codes) if code is None]

    def tails(self, lines: int = 20) -> str:
        """Returns the last lines of every rank's output."""
        texts = [path.read_text(errors="replace").splitlines() for path in self.outputs]
        return "\n".join(
            f"rank {rank}:\n" + "\n".join(text[-lines:]) for rank, text in enumerate(texts)
        )


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
