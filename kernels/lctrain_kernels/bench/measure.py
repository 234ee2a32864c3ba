"""Measures an attention on a workload: times of forward and backward, and peak memory."""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

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
    """Returns a timer of GPU calls: the median of repeats with a cold L2 cache, in milliseconds.

    The repeats of one call take about `milliseconds` together.
    """
    from triton.testing import do_bench

    return lambda call: do_bench(
        call, warmup=milliseconds // 4, rep=milliseconds, return_mode="median"
    )


def measure(peer: Peer, inputs: AttentionInputs, timer: Timer, repetitions: int = 1) -> Timing:
    """Measures the time and memory of a peer.

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

    def step() -> None:
        torch.autograd.grad(call(), inputs.leaves, inputs.grad_out)

    def forward() -> None:
        with torch.no_grad():
            call()

    peak_bytes = _peak_bytes(step, inputs.q.device)
    forward_peak_bytes = _peak_bytes(forward, inputs.q.device)
    out = call()

    def backward() -> None:
        torch.autograd.grad(out, inputs.leaves, inputs.grad_out, retain_graph=True)

    times = [(timer(forward), timer(backward)) for _ in range(repetitions)]
    return Timing(
        forward_ms=median(forward_ms for forward_ms, _ in times),
        backward_ms=median(backward_ms for _, backward_ms in times),
        peak_bytes=peak_bytes,
        forward_peak_bytes=forward_peak_bytes,
    )


def _peak_bytes(step: Callable[[], None], device: torch.device) -> int | None:
    """Returns the peak memory of a compiled step beyond its inputs, in bytes."""
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
