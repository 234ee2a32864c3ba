"""check_launch: compares the ranks that torchrun or srun has started with those of the trainer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

from lctrain.limits import require


class Launch(NamedTuple):
    """The ranks that a launcher has started.

    Attributes:
        tasks: Number of ranks.
        machines: Number of machines.
        is_even: Whether all machines have the same number of ranks.
        options: The launcher's options for ranks per machine and for machines.
    """

    tasks: int
    machines: int
    is_even: bool
    options: tuple[str, str]


def launch_of(environment: Mapping[str, str]) -> Launch | None:
    """Returns what a launcher has started; None if Lightning starts the ranks.

    Args:
        environment: Environment variables by name.
    """
    if "TORCHELASTIC_RUN_ID" in environment:
        tasks, local = int(environment["WORLD_SIZE"]), int(environment["LOCAL_WORLD_SIZE"])
        options = ("--nproc-per-node", "--nnodes")
        return Launch(tasks, max(tasks // local, 1), tasks % local == 0, options)
    interactive = environment.get("SLURM_JOB_NAME") in ("bash", "interactive")
    if "SLURM_NTASKS" not in environment or interactive:
        return None
    machines = environment.get("SLURM_NNODES") or environment.get("SLURM_JOB_NUM_NODES") or "1"
    is_even = "," not in environment.get("SLURM_TASKS_PER_NODE", "")  # such as 8(x2) or 8,4
    options = ("--ntasks-per-node", "--nodes")
    return Launch(int(environment["SLURM_NTASKS"]), int(machines), is_even, options)


def check_launch(
    devices: int | None, machines: int, environment: Mapping[str, str] | None = None
) -> None:
    """Raises ValueError if a launcher has started other ranks than the trainer expects.

    Args:
        devices: Ranks per machine; None for one per device, which is not compared.
        machines: Number of machines.
        environment: Environment variables by name; None for those of this process.
    """
    launch = launch_of(os.environ if environment is None else environment)
    if launch is None:
        return
    per_machine, nodes = launch.options
    require(
        launch.is_even,
        f"every machine must have the same number of ranks, got {launch.tasks} on "
        f"{launch.machines} machines. Start it with {per_machine}={devices or 'DEVICES'}.",
    )
    require(
        launch.machines == machines,
        f"trainer.num_nodes must be the number of machines, got {machines} and {launch.machines} "
        f"by the launcher. Set trainer.num_nodes={launch.machines}, or start it with "
        f"{nodes}={machines}.",
    )
    started = launch.tasks // launch.machines
    require(
        devices is None or started == devices,
        f"trainer.devices must be the ranks per machine, got {devices} and {started} by the "
        f"launcher. Set trainer.devices={started}, or start it with {per_machine}={devices}.",
    )
