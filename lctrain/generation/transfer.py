"""Copies between host and device that do not wait: upload, and Readback of chosen tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lctrain.generation.request import Request


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a copy of a tensor of the host on a device, without a synchronisation.

    A copy from pageable memory would wait for all kernels that have been launched.

    Args:
        tensor: Tensor on the CPU.
        device: Device of the copy.
    """
    if device.type != "cuda" or not tensor.numel():
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Readback:
    """Tokens of some requests on their way to the host, while the device goes on.

    Args:
        requests: Requests, one per token.
        values: Ids and log-probabilities of the tokens, [2, n] float64. Ids are exact in float64.
            They may be overwritten after this call.

    Attributes:
        requests: Requests, one per token.
    """

    def __init__(self, requests: Sequence[Request], values: Tensor) -> None:
        self.requests = list(requests)
        self._host = values.to("cpu", non_blocking=True, copy=True)  # pinned, if from a GPU
        self._done: torch.cuda.Event | None = None
        if values.is_cuda:
            self._done = torch.cuda.Event()
            self._done.record(torch.cuda.current_stream(values.device))

    def read(self) -> tuple[list[int], list[float]]:
        """Waits for the tokens, and returns their ids and log-probabilities."""
        if self._done is not None:
            self._done.synchronize()
        ids, log_probs = self._host.tolist()
        return list(map(int, ids)), log_probs
