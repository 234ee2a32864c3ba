"""CUDA graphs of a decode step: GraphCapture records one; capture_refusal says why it cannot."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

_KNOWN = ("lctrain", "transformers", "peft", "torch")
"""Packages whose hooks compute the same in every step, so that a replay may leave them out."""

LEAST_FREE = 2**30
"""Bytes that the driver must have free, or the allocator gives memory back before a capture."""


class GraphCapture:
    """Captures functions as CUDA graphs that share one memory pool.

    The host records kernels while the device works on earlier ones. `torch.cuda.graph` would wait
    for these, to give the allocator's memory back.

    Args:
        device: GPU on which the functions run, with its index.

    Attributes:
        used: Whether a capture has begun, and so taken memory from the pool.
    """

    def __init__(self, device: torch.device) -> None:
        self.used = False
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        # Failed graphs, to which the allocators refer, and the first of each pool: the allocator
        # refuses captures into a pool whose graphs are all gone.
        self._kept: list[torch.cuda.CUDAGraph] = []
        self._pool_is_new = True

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Returns a function that replays the graph, and the tensor that a replay fills.

        A replay of one graph overwrites the results of the others. A capture that fails leaves the
        stream, the allocator and the random state as they were. Later captures get a new pool.

        Args:
            function: Launches kernels on buffers of fixed places. It has run before, so nothing is
                compiled or tuned during the capture.

        Raises:
            RuntimeError: if an operation of the function cannot be captured.
        """
        self.used = True
        with torch.cuda.device(self._device):
            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
            state = torch.cuda.get_rng_state(self._device)
            try:
                with self._capturing(graph):
                    result = function()
            except BaseException:
                self._kept.append(graph)
                torch.cuda.set_stream(stream)  # the failed capture has left its own stream
                try:
                    self._end_failed(state)
                finally:
                    torch.cuda.set_stream(stream)
                raise
            if self._pool_is_new:
                self._kept.append(graph)
                self._pool_is_new = False
        return graph.replay, result

    @contextmanager
    def _capturing(self, graph: torch.cuda.CUDAGraph) -> Iterator[None]:
        """Context in which the kernels of this thread are recorded instead of launched."""
        if torch.cuda.mem_get_info(self._device)[0] < LEAST_FREE:
            torch.cuda.empty_cache()  # synchronises
        with torch.cuda.stream(capture_stream(self._device)), _no_collection():
            # Other threads, such as those that pin batches, may go on meanwhile.
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                yield
            finally:
                graph.capture_end()

    def _end_failed(self, state: Tensor) -> None:
        """Ends what torch leaves open when the end of a capture raises.

        The allocator goes on taking memory of the stream from the pool, and the random generator
        stays in its mode of captures, in which every later draw fails. The end of a capture that
        succeeds leaves that mode. It needs another pool: nothing can tell the allocator of pinned
        memory that the failed capture has ended, and it refuses a pool in which one runs.

        Args:
            state: State of the random generator before the capture.
        """
        end_pool = getattr(torch._C, "_cuda_endAllocateToPool", None)
        if end_pool is not None:
            with suppress(RuntimeError):  # the end of the capture did not raise
                end_pool(self._device.index, self._pool)
        self._pool = torch.cuda.graph_pool_handle()
        buffer, graph = torch.zeros(1, device=self._device), torch.cuda.CUDAGraph()
        with self._capturing(graph):
            buffer.add_(1)
        self._kept.append(graph)
        self._pool_is_new = False
        torch.cuda.set_rng_state(state, self._device)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Context without Python's collector, which could destroy another graph during a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Returns the stream on which graphs of a device are recorded, the same in every call.

    cuBLAS keeps a workspace for each stream that has used it.

    Args:
        device: A GPU, with its index.
    """
    return torch.cuda.Stream(device)


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
