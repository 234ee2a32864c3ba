"""Reads how many bytes this process may still allocate, on its GPU and on the host."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import torch

CGROUP = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")
MEMINFO = Path("/proc/meminfo")
HOST_SHARE = 0.8
"""Part of the free host memory that offloading may take; the rest is for data and checkpoints."""


def free_device_bytes(device: torch.device) -> int:
    """Returns the free bytes of a GPU; for a CPU device, the free bytes of the host."""
    if device.type != "cuda":
        return free_host_bytes()
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free + cached)


def free_host_bytes(
    cgroup: Path = CGROUP, meminfo: Path = MEMINFO, own_groups: Path = OWN_GROUPS
) -> int:
    """Returns the host memory in bytes that this process may still allocate.

    The result is the smallest of these numbers:

    - the memory that the machine has available;
    - for the process's control group and every group around it: the group's limit minus the memory
      in use. The groups are those of cgroup version 2, or of version 1 in `memory/`.

    In a container the machine's available memory alone may exceed the container's limit.

    Args:
        cgroup: Folder in which the control groups are mounted.
        meminfo: File with the machine's memory, in the format of /proc/meminfo.
        own_groups: File that names the control groups of this process.
    """
    found = []
    for line in _lines(meminfo):
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    newer, older = _own_paths(own_groups)
    for root, path, limit_name, used_name in (
        (cgroup, newer, "memory.max", "memory.current"),
        (cgroup / "memory", older, "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        # In a container, the host's path may be missing; the root is then the container's group.
        for group in (root / path, *(root / parent for parent in path.parents)):
            limit, used = _lines(group / limit_name), _lines(group / used_name)
            if limit and used and limit[0].isdigit() and used[0].isdigit():
                reclaimable = _reclaimable(group / "memory.stat")
                found.append(max(int(limit[0]) - int(used[0]) + reclaimable, 0))
    return min(found, default=0)


def _own_paths(own_groups: Path) -> tuple[PurePosixPath, PurePosixPath]:
    """Returns the paths of this process's control groups: version 2's, and version 1's for memory.

    Args:
        own_groups: File with lines "number:controllers:/path"; version 2 names no controllers.
    """
    newer = older = PurePosixPath()
    for line in _lines(own_groups):
        _, controllers, path = line.split(":", 2)
        parts = [part for part in PurePosixPath(path).parts if part not in ("/", "..")]
        if controllers == "":
            newer = PurePosixPath(*parts)
        elif "memory" in controllers.split(","):
            older = PurePosixPath(*parts)
    return newer, older


def _reclaimable(stat: Path) -> int:
    """Returns the bytes of a control group's file cache, which it drops when memory is short."""
    for line in _lines(stat):
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file"):
            return int(value)
    return 0


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
