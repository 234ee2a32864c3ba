"""Copies between host and device that do not wait for the device's queued work."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def on_device(values: np.ndarray, device: torch.device) -> Tensor:
    """Returns an array as a tensor on a device.

    A copy to a GPU comes from pinned memory, so that the host goes on while the GPU computes.
    """
    tensor = torch.from_numpy(values)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class HostCopy:
    """A copy of a tensor in host memory, which begins at once and is awaited when it is read."""

    def __init__(self, values: Tensor) -> None:
        """Begins the copy.

        Args:
            values: Tensor of any dtype on any device.
        """
        self._event: torch.cuda.Event | None = None
        if values.device.type != "cuda":
            self._host = values.cpu()
            return
        self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        self._host.copy_(values, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(values.device))

    def numpy(self) -> np.ndarray:
        """Returns the values, after the copy has ended."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.numpy()
