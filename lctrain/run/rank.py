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
    """Returns the number of this rank on its machine, from torchrun's LOCAL_RANK; 0 without it."""
    return int(os.environ.get("LOCAL_RANK") or 0)


def ranks_on_machine() -> int:
    """Returns the number of ranks on this machine, from torchrun's LOCAL_WORLD_SIZE, else 1.

    Lightning's own launcher sets no such variable.
    """
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 1)


def launched_size() -> int:
    """Returns the number of ranks that torchrun started, from WORLD_SIZE; 1 without it."""
    return int(os.environ.get("WORLD_SIZE") or 1) if is_launched() else 1


def is_launched() -> bool:
    """Whether torchrun started this process as one of its ranks."""
    return "RANK" in os.environ


def _of_this_process(environment: Mapping[str, str] | None) -> Mapping[str, str]:
    # Read at each call: `Dataset.map` with several processes assigns a copy to `os.environ`.
    return os.environ if environment is None else environment
