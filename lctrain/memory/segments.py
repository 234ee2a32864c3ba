"""Segments: groups of consecutive layers of which only the first layer's input is kept.

Before the backward of a segment, all its layers except the last run once more, and autograd saves
nothing. Their outputs are the inputs of the segment's other layers. This run computes no attention
whose outputs are kept; others it may keep until the layer's own backward. The backward then goes
through the segment from its last layer to its first. A layer that FSDP2 shards gathers its
parameters for this run too.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lctrain.distributed.gather import gathered
from lctrain.memory.attention import KeptResults
from lctrain.memory.randomness import RandomState


class LayerInput:
    """The input of a layer in the backward: hidden states [B, S, E], kept or computed again.

    Args:
        source: Object whose `get` returns the hidden states: OnDevice, OnHost, or the LayerCall of
            the layer before.
    """

    def __init__(self, source: Any) -> None:
        self._source = source
        self._value: Tensor | None = None

    def peek(self) -> Tensor:
        """Returns the hidden states. They stay on the GPU until `get` is called."""
        if self._value is None:
            self._value = self._source.get()
        return self._value

    def get(self) -> Tensor:
        """Returns the hidden states without autograd history, and drops the reference to them.

        The layer's own backward calls it, during which tensors on the host are copied back for the
        layer before.
        """
        value, self._value = self.peek(), None
        self._source.prefetch()
        return value.detach()


class LayerCall:
    """One layer's call in the forward, which the backward repeats to compute the output again.

    Args:
        layer: The layer's forward.
        x: Hidden states [B, S, E] that the layer got.
        given: Further positional arguments of the layer.
        options: Keyword arguments of the layer.
        inputs: LayerInput that returns the hidden states in the backward.
        results: Kept outputs of the layer's attention, or the place for those of this run; None if
            attention is computed in every run.
        module: The layer itself, whose parameters may be sharded.
    """

    def __init__(
        self,
        layer: Callable[..., Any],
        x: Tensor,
        given: Sequence[Any],
        options: Mapping[str, Any],
        inputs: LayerInput,
        results: KeptResults | None,
        module: nn.Module,
    ) -> None:
        self._layer = layer
        self._module = module
        self._given = given
        self._options = options
        self._inputs = inputs
        self._results = results
        self._requires_grad = x.requires_grad
        self._random = RandomState(x)
        self._output: tuple[weakref.ref[Tensor], int] | None = None

    def returned(self, found: Any) -> None:
        """Records the layer's output: a tensor, or a tuple that begins with one."""
        x = _first(found)
        self._output = weakref.ref(x), x._version

    def made(self, x: Tensor) -> bool:
        """Returns whether x is the layer's recorded output and was not changed in place since.

        FSDP2's hooks pass a layer a whole view of its input, which counts as the input itself.
        """
        reference, version = self._output or (None, 0)
        output = None if reference is None else reference()
        if output is None or version != x._version:
            return False
        return x is output or (x._base is output and _layout(x) == _layout(output))

    def get(self) -> Tensor:
        """Runs the layer again, and returns its output, with the same bits."""
        results = nullcontext() if self._results is None else self._results.rebuilding()
        x = self._inputs.peek().detach().requires_grad_(self._requires_grad)
        # Autograd is on but saves nothing, so operations choose the kernels of the forward.
        nothing: Any = lambda saved: None  # noqa: E731
        hooks = saved_tensors_hooks(nothing, nothing)
        with gathered(self._module), self._random.again(), torch.enable_grad(), hooks, results:
            return _first(self._layer(x, *self._given, **self._options)).detach()

    def prefetch(self) -> None:
        """Does nothing: what this call reads is still on the GPU, or follows with its attention."""


def _layout(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.stride(), x.storage_offset(), x.dtype


def _first(found: Any) -> Tensor:
    return found[0] if isinstance(found, tuple) else found
