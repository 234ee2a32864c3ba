"""LayerProgress: reports when the device reaches each layer of a training step."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

POLL_SECONDS = 0.2
Report = Callable[[str, int, float], None]


class LayerProgress:
    """Context manager around one step: reports each run of a layer once the device has reached it.

    The host launches a step's kernels long before the device runs them. Therefore a CUDA event is
    recorded at each layer, and a thread asks which events have passed. The step never waits.

    Args:
        layers: Decoder layers of a transformers model, in order. Their attribute `self_attn` is the
            attention.
        device: Device of the step.
        report: Function that a layer's run is reported to: the phase ("forward", or "backward" for
            every later run), the layer's number from 0, and the seconds since the step began. It
            is called in the thread.
    """

    def __init__(self, layers: Sequence[Any], device: torch.device, report: Report) -> None:
        self._layers = layers
        self._device = device
        self._report = report
        self._waiting: deque[tuple[str, int, Any]] = deque()
        self._seen: set[int] = set()
        self._ended = threading.Event()

    def __enter__(self) -> LayerProgress:
        self._hooks = [
            layer.self_attn.register_forward_pre_hook(partial(self._reached, index))
            for index, layer in enumerate(self._layers)
        ]
        self._begin = time.perf_counter()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._ended.set()
        self._thread.join()

    def _reached(self, index: int, module: Any, given: Any) -> None:
        """Hook before a layer's attention."""
        event = None
        if self._device.type == "cuda":
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self._device))
        self._waiting.append(("backward" if index in self._seen else "forward", index, event))
        self._seen.add(index)

    def _poll(self) -> None:
        while not self._ended.wait(POLL_SECONDS):
            self._report_passed()
        self._report_passed()

    def _report_passed(self) -> None:
        while self._waiting and (self._waiting[0][2] is None or self._waiting[0][2].query()):
            phase, index, _ = self._waiting.popleft()
            self._report(phase, index, time.perf_counter() - self._begin)
