"""Starts the ranks of a test, each as a process that joins the others by a file.

Usage: python -m tests.distributed.ranks MODULE SIZE FOLDER [arguments of MODULE]
"""

import importlib
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist

from lctrain.process_group import leave_at_exit
from tests.forked import Forked

ROOT = Path(__file__).parents[2]
LIMIT_S = 900  # ranks that wait for each other for ever end after it


def run_ranks(module: str, size: int, folder: Path, *arguments: str) -> None:
    """Runs `main()` of a module for every rank, and waits for all.

    A rank is a forked process with `sys.argv[1:] = [RANK, SIZE, FOLDER, *ARGUMENTS]`, whose output
    goes to FOLDER/rank_RANK.txt. One process imports the module, and torch with it, for all of
    them. If a rank fails, the others are ended, since they would wait for it.

    Args:
        module: Dotted name of a module whose `main` calls `join`.
        size: Number of ranks.
        folder: Folder of the ranks' files.
        *arguments: Further arguments of every rank.
    """
    output = folder / "ranks.txt"
    with output.open("w") as file:
        started = Forked(
            "tests.distributed.ranks",
            *(module, str(size), str(folder), *arguments),
            env={"NODE_RANK": "0"},
            ignored=True,
            stdout=file,
            stderr=file,
        )
    try:
        status = started.wait(LIMIT_S)
    finally:
        with suppress(ProcessLookupError):  # of a process group that has ended
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()
    assert status == 0, output.read_text(errors="replace")


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
    """Runs `main(rank, size, folder)` in a forked process per rank, and exits if one fails.

    The ranks share what this process has imported. Call it before threads or devices are in use.

    Args:
        main: Function of a rank, which has joined the others.
        size: Number of ranks.
        folder: Folder of the ranks' files.
    """

    def start(rank: int) -> None:
        os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
        store = f"file://{folder}/rendezvous"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
        main(rank, size, folder)

    if fork(start, size) is not None:
        sys.exit(1)


def fork(start: Callable[[int], None], size: int) -> int | None:
    """Runs `start(rank)` in a forked process per rank. If one fails, the others are killed.

    Args:
        start: Function of a rank.
        size: Number of ranks.

    Returns:
        The rank that failed first; None if none did.
    """
    children = {}
    for rank in range(size):
        if (child := os.fork()) == 0:
            status = 1
            try:
                start(rank)
                status = 0
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else int(end.code is not None)
                if isinstance(end.code, str):
                    print(end.code, file=sys.stderr)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        children[child] = rank
    failed = None
    while children:
        child, status = os.wait()
        rank = children.pop(child)
        if status and failed is None:
            failed = rank
            for other in children:
                os.kill(other, signal.SIGKILL)
    return failed


def run_module(name: str, size: int, folder: Path, arguments: Sequence[str]) -> None:
    """Runs `main()` of a module in a forked process per rank: see `run_ranks`."""
    module = importlib.import_module(name)
    outputs = [folder / f"rank_{rank}.txt" for rank in range(size)]

    def start(rank: int) -> None:
        # Lightning takes a process with LOCAL_RANK for one that a launcher has started.
        os.environ["LOCAL_RANK"] = str(rank)
        sys.argv = [name, str(rank), str(size), str(folder), *arguments]
        with outputs[rank].open("w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        module.main()

    if (failed := fork(start, size)) is not None:
        sys.exit(f"rank {failed}: {outputs[failed].read_text(errors='replace')}")


if __name__ == "__main__":
    run_module(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
