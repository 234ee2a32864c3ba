"""leave_at_exit and launched_ranks: leave and join the process group of a run."""

from __future__ import annotations

import atexit
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed

from lctrain.distributed import ONE_RANK, Topology

LIMIT = timedelta(days=7)  # a rank may wait while another one reads the data


@contextmanager
def launched_ranks(size: int) -> Iterator[Topology]:
    """Context manager that joins the ranks which torchrun started, and yields their topology.

    The collectives take values on the CPU. A process that has a process group already is a single
    rank.

    Args:
        size: Number of ranks that torchrun started; 1 without torchrun.
    """
    if size == 1 or torch.distributed.is_initialized():
        yield ONE_RANK
        return
    torch.distributed.init_process_group("gloo", timeout=LIMIT)
    try:
        yield Topology.of_process()
    finally:
        torch.distributed.destroy_process_group()


def leave_at_exit() -> None:
    """Registers a function that destroys a gloo process group before the interpreter ends.

    Otherwise the thread of gloo runs while Python shuts down, which sometimes aborts a process that
    has finished (torch 2.13). Lightning does the same for NCCL.
    """
    atexit.register(_leave)


def _leave() -> None:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    if torch.distributed.get_backend() == "gloo":
        # While this thread sleeps, gloo's thread gets the interpreter lock and finishes its work.
        time.sleep(0.1)
        torch.distributed.destroy_process_group()
