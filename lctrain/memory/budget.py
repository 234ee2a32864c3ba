"""Reads how many bytes this process may still allocate, on its GPU and on the host."""

from __future__ import annotations

from pathlib import Path

import torch

CGROUP = Path("/sys/fs/cgroup")
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


def free_host_bytes(cgroup: Path = CGROUP, meminfo: Path = MEMINFO) -> int:
    """Returns the host memory that this process may still take, in bytes.

    It is the smaller of what the machine has available and what the limit of the control group
    (version 2, or version 1 in `memory/`) leaves. In a container, the machine's memory says
    nothing about the limit.

    Args:
        cgroup: Folder of the control groups.
        meminfo: File of the machine's memory.
    """
    found = []
    for line in _lines(meminfo):
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    pairs = (("memory.max", "memory.current"),)
    older = (("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),)
    for limit_name, used_name in (*pairs, *older):
        limit, used = _lines(cgroup / limit_name), _lines(cgroup / used_name)
        if limit and used and limit[0].isdigit() and used[0].isdigit():
            reclaimable = _reclaimable(cgroup / Path(used_name).parent / "memory.stat")
            found.append(max(int(limit[0]) - int(used[0]) + reclaimable, 0))
    return min(found, default=0)


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
