"""Profiles one training step: time per kernel, and the share of time in which the GPU is idle."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

KERNELS = 40  # number of kernels that a profile lists


def profile_step(step: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Profiles two consecutive runs of a step on a GPU. The step has run before.

    Args:
        step: Function that runs the step.
        device: A GPU. On a CPU idle_share is None, and kernels is empty.

    Returns:
        idle_share: Share of the time, from the first kernel's start to the last kernel's end, in
            which no kernel runs.
        kernels: The KERNELS kernels with the most total time, each with its name, milliseconds per
            step and calls per step.
    """
    if device.type != "cuda":
        return {"idle_share": None, "kernels": []}
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        # Two steps without a pause: during the first, the host can launch kernels ahead.
        step()
        step()
        torch.cuda.synchronize(device)
    spans = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in found.events() or []
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not getattr(event, "is_user_annotation", False)
    ]
    return summarize(spans, steps=2)


def summarize(spans: Iterable[tuple[str, float, float]], steps: int = 1) -> dict[str, Any]:
    """Summarizes the kernel times of a profile; the result is that of `profile_step`.

    Args:
        spans: Name, begin and end of every kernel launch, in microseconds.
        steps: Number of steps in which these kernels ran.
    """
    ordered = sorted(spans, key=lambda span: span[1])
    busy, end = 0.0, float("-inf")
    totals: dict[str, list[float]] = {}
    for name, begin, finish in ordered:
        busy += max(0.0, finish - max(begin, end))
        end = max(end, finish)
        total = totals.setdefault(name[:90], [0.0, 0])
        total[0] += finish - begin
        total[1] += 1
    whole = end - ordered[0][1] if ordered else 0.0
    longest = sorted(totals.items(), key=lambda item: -item[1][0])[:KERNELS]
    return {
        "idle_share": round(1.0 - busy / whole, 4) if whole else None,
        "kernels": [
            {"ms": round(time / steps / 1000, 3), "calls": int(calls) // steps, "kernel": name}
            for name, (time, calls) in longest
        ],
    }
