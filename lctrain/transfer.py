"""Copies between host and device that do not wait for the device's queued work."""

from __future__ import annotations

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a tensor of the host on a device, without a synchronisation.

    A copy to a GPU comes from pinned memory. From other memory it would wait for all kernels that
    have been launched.

    Args:
        tensor: Tensor on the CPU.
        device: Device of the result. On a CPU the result is the tensor itself.
    """
    if device.type != "cuda" or not tensor.numel():
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class HostCopy:
    """A copy of a tensor in host memory, which begins at once while the device goes on.

    Args:
        values: Tensor of any dtype on any device. Later work on the same stream may
            overwrite it.
    """

    def __init__(self, values: Tensor) -> None:
        self._host = values.to("cpu", non_blocking=True, copy=True)  # pinned, if from a GPU
        self._done: torch.cuda.Event | None = None
        if values.is_cuda:
            self._done = torch.cuda.Event()
            self._done.record(torch.cuda.current_stream(values.device))

    def wait(self) -> Tensor:
        """Returns the copy, once it has ended."""
        if self._done is not None:
            self._done.synchronize()
        return self._host
