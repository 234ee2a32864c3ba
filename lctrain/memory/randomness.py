"""RandomState: states of torch's generators, with which a run draws the same numbers again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states


class RandomState:
    """The states of torch's generators on the CPU and on a tensor's device.

    Args:
        x: Tensor of any shape on the device.
    """

    def __init__(self, x: Tensor) -> None:
        self._state = torch.get_rng_state()
        self._devices, self._states = get_device_states(x)
        # torch.random.fork_rng accepts no "cpu"
        self._kind = x.device.type if self._devices else "cuda"

    @contextmanager
    def again(self) -> Iterator[None]:
        """Context manager in which the generators have the states of this object."""
        with torch.random.fork_rng(self._devices, device_type=self._kind):
            torch.set_rng_state(self._state)
            set_device_states(self._devices, self._states)
            yield
