"""Measures an attention on a workload: times of forward and backward, and peak memory."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lctrain_kernels.bench.inputs import AttentionInputs
from lctrain_kernels.bench.peers import Peer

Timer = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class Timing:
    """Times and memory of one implementation.

    Attributes:
        forward_ms: Median time of a forward without autograd graph, in milliseconds.
        backward_ms: Median time of a backward through one autograd graph, in milliseconds.
        peak_bytes: Peak memory of forward and backward beyond the inputs, in bytes; None on a CPU.
        forward_peak_bytes: Peak memory of a forward without autograd graph beyond the inputs, in
            bytes; None on a CPU.
    """

    forward_ms: float
    backward_ms: float
    peak_bytes: int | None
    forward_peak_bytes: int | None = None


def gpu_timer(milliseconds: int) -> Timer:
    """Returns a function that times a call on a GPU: the median of repeats, in milliseconds.

    The L2 cache is emptied before each repeat. The repeats of one call take about `milliseconds`
    together.
    """
    from triton.testing import do_bench

    return lambda call: do_bench(
        call, warmup=milliseconds // 4, rep=milliseconds, return_mode="median"
    )


def graph_timer(milliseconds: int) -> Timer:
    """Returns a timer that replays CUDA graphs of a call, so the host's time does not count.

    The current stream must not be the default one, and what the call differentiates must have been
    computed on it. The repeats of one call take about `milliseconds` together.
    """

    def time(call: Callable[[], object]) -> float:
        stream = torch.cuda.current_stream()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(3):
            call()
        begin.record()
        call()
        end.record()
        end.synchronize()
        estimate = max(begin.elapsed_time(end), 1e-3)
        calls = max(1, min(50, int(milliseconds / GRAPH_REPLAYS / estimate)))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(calls):
                call()
        times = []
        for _ in range(1 + GRAPH_REPLAYS):
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / calls)
        return median(times[1:])  # the first replay uploads the graph

    return time


GRAPH_REPLAYS = 5


def measure(peer: Peer, inputs: AttentionInputs, timer: Timer, repetitions: int = 1) -> Timing:
    """Measures the time of a peer's forward and backward, and their peak memory.

    Args:
        peer: Attention to measure.
        inputs: Tensors of the workload.
        timer: Function that returns the milliseconds of a call.
        repetitions: Number of times that forward and backward are timed, alternately. The result is
            the median.

    Raises:
        UnsupportedWorkload: if the peer cannot serve the workload.
    """
    call = peer.prepare(inputs)
    return measure_call(call, inputs.leaves, inputs.grad_out, timer, repetitions)


def measure_call(
    call: Callable[[], Any], leaves: Sequence[Tensor], grads: Any, timer: Timer, repetitions: int
) -> Timing:
    """Measures the time and memory of a differentiable call.

    Args:
        call: Function that returns a tensor or a tuple of tensors.
        leaves: Tensors that get a gradient.
        grads: Gradients of what the call returns: a tensor or a tuple of tensors.
        timer: Function that returns the milliseconds of a call.
        repetitions: Number of times that forward and backward are timed, alternately. The result is
            the median.
    """
    device = leaves[0].device

    def step() -> None:
        torch.autograd.grad(call(), leaves, grads)

    def forward() -> None:
        with torch.no_grad():
            call()

    peak_bytes = peak_bytes_of(step, device)
    forward_peak_bytes = peak_bytes_of(forward, device)
    out = call()

    def backward() -> None:
        torch.autograd.grad(out, leaves, grads, retain_graph=True)

    times = [(timer(forward), timer(backward)) for _ in range(repetitions)]
    return Timing(
        forward_ms=median(forward_ms for forward_ms, _ in times),
        backward_ms=median(backward_ms for _, backward_ms in times),
        peak_bytes=peak_bytes,
        forward_peak_bytes=forward_peak_bytes,
    )


def peak_bytes_of(step: Callable[[], object], device: torch.device) -> int | None:
    """Returns the peak GPU memory of a step that has run before, beyond its inputs, in bytes.

    Returns None on a CPU.
    """
    step()
    if device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
