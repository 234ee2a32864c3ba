"""Reads the rank of this process from environment variables, before a process group exists."""

from __future__ import annotations

import os
from collections.abc import Mapping


def is_rank_zero(environment: Mapping[str, str] | None = None) -> bool:
    """Whether this process is rank 0 of its run.

    torchrun sets RANK, srun sets SLURM_PROCID, and Lightning sets LOCAL_RANK and NODE_RANK. Without
    these variables the process is rank 0: it is the only process, or it starts the other ranks.

    Args:
        environment: Environment variables by name; None for those of this process.
    """
    environment = _of_this_process(environment)
    for name in ("RANK", "SLURM_PROCID"):
        if environment.get(name, "").isdigit():
            return environment[name] == "0"
    return all(environment.get(name, "0") in ("", "0") for name in ("LOCAL_RANK", "NODE_RANK"))


def is_launched_by_lightning(environment: Mapping[str, str] | None = None) -> bool:
    """Whether Lightning started this process as a rank other than 0 on this machine."""
    environment = _of_this_process(environment)
    return "RANK" not in environment and environment.get("LOCAL_RANK", "0") not in ("", "0")


def local_rank() -> int:
    """Returns the number of this rank on its machine, from torchrun or srun; 0 without them."""
    if in_slurm_step():
        return int(os.environ.get("SLURM_LOCALID") or 0)
    return int(os.environ.get("LOCAL_RANK") or 0)


def ranks_on_machine() -> int:
    """Returns the number of ranks on this machine, from torchrun or srun, else 1.

    Lightning's own launcher sets no such variable.
    """
    if in_slurm_step():
        tasks = int(os.environ["SLURM_STEP_NUM_TASKS"])
        return -(-tasks // int(os.environ.get("SLURM_STEP_NUM_NODES") or 1))
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 1)


def launched_size() -> int:
    """Returns the number of ranks that torchrun or srun started; 1 without them."""
    if in_slurm_step():
        return int(os.environ["SLURM_STEP_NUM_TASKS"])
    return int(os.environ.get("WORLD_SIZE") or 1) if is_launched() else 1


def launched_rank() -> int:
    """Returns the number of this rank, from torchrun or srun; 0 without them."""
    return int(os.environ["SLURM_PROCID"] if in_slurm_step() else os.environ.get("RANK") or 0)


def in_slurm_step() -> bool:
    """Whether srun started this process as one of several tasks, and torchrun did not.

    A batch script is no task of srun, although it has the variables of its job, such as
    SLURM_NTASKS. A shell that srun opened is not one either.
    """
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "")
    shell = os.environ.get("SLURM_JOB_NAME") in ("bash", "sh", "zsh")
    return not is_launched() and not shell and tasks.isdigit() and int(tasks) > 1


def is_launched() -> bool:
    """Whether torchrun started this process as one of its ranks."""
    return "RANK" in os.environ


def _of_this_process(environment: Mapping[str, str] | None) -> Mapping[str, str]:
    # Read at each call: `Dataset.map` with several processes assigns a copy to `os.environ`.
    return os.environ if environment is None else environment
