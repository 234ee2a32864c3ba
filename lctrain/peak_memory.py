"""Peak of torch's memory on a GPU: of a whole run, and since the last evaluation."""

from __future__ import annotations

import torch

_before: dict[int, int] = {}
"""Peak in bytes up to the last `split_peak`, by index of the device, as in torch's own counter."""


def peak_bytes(device: torch.device) -> int:
    """Returns the most bytes that torch has allocated on a GPU since `restart_peak`."""
    return max(_before.get(_index(device), 0), torch.cuda.max_memory_allocated(device))


def restart_peak(device: torch.device) -> None:
    """Begins a new peak on a GPU, as at the start of a training."""
    _before.pop(_index(device), None)
    torch.cuda.reset_peak_memory_stats(device)


def split_peak(device: torch.device) -> None:
    """Resets torch's counter on a GPU, but not `peak_bytes`.

    So torch.cuda.max_memory_allocated then returns the peak of what follows alone.
    """
    _before[_index(device)] = peak_bytes(device)
    torch.cuda.reset_peak_memory_stats(device)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
