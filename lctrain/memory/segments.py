"""Segments: inputs of layers that are not kept are rebuilt from the layers before them.

Only the input of a segment's first layer is kept. In the backward of the segment's last layer, the
layers before it run once more without saving anything, and their outputs are the inputs that the
segment's layers need. Kept attention results are reused, so that attention is not computed again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import get_device_states, set_device_states

from lctrain.memory.attention import KeptResults


class LayerInput:
    """Input of a layer, [..., T, E], for the layer's backward.

    Args:
        source: Object whose `get` returns the input: a kept tensor, or the layer before's call.
    """

    def __init__(self, source: Any) -> None:
        self._source = source
        self._value: Tensor | None = None

    def peek(self) -> Tensor:
        """Returns the input, and keeps it on the device until `get`."""
        if self._value is None:
            self._value = self._source.get()
        return self._value

    def get(self) -> Tensor:
        """Returns the input, without a gradient's history, and lets go of it."""
        value, self._value = self.peek(), None
        return value.detach()


class LayerCall:
    """A layer's call in a forward pass, which can be repeated for its output.

    Args:
        layer: The layer's forward.
        x: The hidden states that the layer got.
        given: Its other arguments.
        options: Its keyword arguments.
        inputs: The hidden states, for the backward.
        results: Kept results of its attention; None if they are recomputed.
    """

    def __init__(
        self,
        layer: Callable[..., Any],
        x: Tensor,
        given: Sequence[Any],
        options: Mapping[str, Any],
        inputs: LayerInput,
        results: KeptResults | None,
    ) -> None:
        self._layer = layer
        self._given = given
        self._options = options
        self._inputs = inputs
        self._results = results
        self._requires_grad = x.requires_grad
        self._random = torch.get_rng_state(), *get_device_states(x)
        self._device = x.device.type
        self._output: tuple[weakref.ref[Tensor], int] | None = None

    def returned(self, found: Any) -> None:
        """Notes the layer's output: a tensor, or a tuple that begins with it."""
        x = _first(found)
        self._output = weakref.ref(x), x._version

    def made(self, x: Tensor) -> bool:
        """Returns whether a tensor is the layer's output, unchanged."""
        if self._output is None:
            return False
        reference, version = self._output
        return reference() is x and version == x._version

    def get(self) -> Tensor:
        """Returns the layer's output again, with the same bits."""
        replay = nullcontext() if self._results is None else self._results.contexts()[1]
        x = self._inputs.peek().detach().requires_grad_(self._requires_grad)
        # A graph that saves nothing: operations choose their kernels as they did in the forward.
        nothing: Any = lambda saved: None  # noqa: E731
        hooks = saved_tensors_hooks(nothing, nothing)
        with self._same_random(), torch.enable_grad(), hooks, replay:
            return _first(self._layer(x, *self._given, **self._options)).detach()

    @contextmanager
    def _same_random(self) -> Iterator[None]:
        """Sets torch's generators to their states in the forward, for the time of a context."""
        state, devices, states = self._random
        with torch.random.fork_rng(devices, device_type=_fork_device(self._device)):
            torch.set_rng_state(state)
            set_device_states(devices, states)
            yield


def _first(found: Any) -> Tensor:
    return found[0] if isinstance(found, tuple) else found


def _fork_device(device: str) -> str:
    """Returns the type of device whose generators are forked; there is none beside the CPU's."""
    return "cuda" if device == "cpu" else device
