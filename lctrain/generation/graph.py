"""CUDA graphs of a decode step: GraphCapture records one; capture_refusal says why it cannot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_KNOWN = ("lctrain", "transformers", "peft", "torch")
"""Packages whose hooks compute the same in every step, so that a replay may leave them out."""


class GraphCapture:
    """Captures functions as CUDA graphs that share one memory pool.

    Args:
        device: GPU on which the functions run.

    Attributes:
        used: Whether a capture has begun, and so taken memory from the pool.
    """

    def __init__(self, device: torch.device) -> None:
        self.used = False
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Returns a function that replays the graph, and the tensor that a replay fills.

        A replay of one graph overwrites the results of the others.

        Args:
            function: Launches kernels on buffers of fixed places. It has run before, so nothing is
                compiled or tuned during the capture.

        Raises:
            RuntimeError: if an operation of the function cannot be captured.
        """
        self.used = True
        with torch.cuda.device(self._device):
            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
            # Other threads, such as those that pin batches, may go on meanwhile.
            capture = torch.cuda.graph(graph, self._pool, capture_error_mode="thread_local")
            try:
                with capture:
                    result = function()
            finally:
                torch.cuda.set_stream(stream)  # a capture that fails leaves its own stream
        return graph.replay, result


def capture_refusal(model: nn.Module) -> str | None:
    """Returns why a replay would not do what a forward pass does; None if it would.

    Args:
        model: A patched causal LM.
    """
    for name, module in model.named_modules():
        if hasattr(module, "_hf_hook"):
            return f"weights of {name or 'the model'} that accelerate moves in every forward"
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            if _package(hook) not in _KNOWN:
                return f"a hook of {_package(hook)} in every forward of {name or 'the model'}"
    devices = {weight.device for weight in model.parameters()}
    if len(devices) > 1 or next(iter(devices)).type != "cuda":
        return f"weights on {', '.join(sorted(map(str, devices)))}"
    return None


def _package(hook: Any) -> str:
    """Returns the top-level package that defines a hook."""
    hook = getattr(hook, "func", hook)  # functools.partial
    module = getattr(hook, "__module__", None) or type(hook).__module__
    return str(module).partition(".")[0]
