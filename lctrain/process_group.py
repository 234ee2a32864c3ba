"""leave_at_exit and launched_ranks: leave and join the process group of a run."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed

from lctrain.distributed import ONE_RANK, Topology
from lctrain.run.rank import in_slurm_step, launched_rank

LIMIT = timedelta(days=7)  # a rank may wait while another one reads the data


@contextmanager
def launched_ranks(size: int) -> Iterator[Topology]:
    """Context manager that joins the ranks of torchrun or srun, and yields their topology.

    The collectives take values on the CPU. A process that has a process group already is a single
    rank.

    Args:
        size: Number of ranks that torchrun or srun started; 1 without them.
    """
    if size == 1 or torch.distributed.is_initialized():
        yield ONE_RANK
        return
    where = slurm_rendezvous(size) if in_slurm_step() else {}
    torch.distributed.init_process_group("gloo", timeout=LIMIT, **where)
    try:
        yield Topology.of_process()
    finally:
        torch.distributed.destroy_process_group()


def slurm_rendezvous(size: int) -> dict[str, Any]:
    """Returns where the tasks of srun meet, and the number of this one, for init_process_group.

    They meet at MASTER_ADDR and MASTER_PORT; by default, at the first machine of the step and a
    port that depends on job and step.

    Args:
        size: Number of tasks.
    """
    from lightning.fabric.plugins.environments import SLURMEnvironment

    environment = os.environ
    nodes = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_NODELIST"]
    address = environment.get("MASTER_ADDR") or SLURMEnvironment.resolve_root_node_address(nodes)
    job = int(environment.get("SLURM_JOB_ID") or 0) + int(environment.get("SLURM_STEP_ID") or 0)
    port = environment.get("MASTER_PORT") or 15000 + job % 10000
    return {"init_method": f"tcp://{address}:{port}", "rank": launched_rank(), "world_size": size}


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
