"""pick_device: the device that a setting names."""

from __future__ import annotations

import torch


def pick_device(name: str) -> torch.device:
    """Returns the device with this name; "auto" is a GPU if there is one, else the CPU.

    Raises:
        ValueError: if this machine does not have the device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device must be one that this machine has, got {name!r} ({reason}). Try auto."
        ) from error
    return device
