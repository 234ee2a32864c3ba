"""Decides which process of a run writes, before any process group exists."""

from __future__ import annotations

import os
from collections.abc import Mapping


def is_rank_zero(environment: Mapping[str, str] = os.environ) -> bool:
    """Returns whether this process is the first of its run, by the launcher's variables.

    torchrun sets RANK, srun SLURM_PROCID, and Lightning LOCAL_RANK and NODE_RANK. Without them the
    process is the only one, or starts the others.

    Args:
        environment: The variables.
    """
    for name in ("RANK", "SLURM_PROCID"):
        if environment.get(name, "").isdigit():
            return environment[name] == "0"
    return all(environment.get(name, "0") in ("", "0") for name in ("LOCAL_RANK", "NODE_RANK"))


def is_launched_by_lightning(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether Lightning started this process as a further rank of a run on this machine."""
    return "RANK" not in environment and environment.get("LOCAL_RANK", "0") not in ("", "0")
