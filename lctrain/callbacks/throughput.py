"""ThroughputMonitor: real tokens per second, model FLOPs, MFU, fill and peak memory."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import astuple, dataclass
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import nn

from lctrain.batch import PackedBatch
from lctrain.cadence import at_log_step
from lctrain.flops import FlopCounter, peak_flops


@dataclass(frozen=True)
class Throughput:
    """Counts of all ranks over a span of training.

    Attributes:
        tokens: Real tokens.
        capacity: Tokens that the rows could have held; 0 if unknown.
        flops: Model FLOPs.
        seconds: Time in training steps, without validation and checkpoints.
    """

    tokens: float = 0.0
    capacity: float = 0.0
    flops: float = 0.0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Of all ranks together."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def fill(self) -> float | None:
        """Real tokens over row capacity; None if the capacity is unknown."""
        return self.tokens / self.capacity if self.capacity > 0 else None

    def __add__(self, other: Throughput) -> Throughput:
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Throughput(*(mine + theirs for mine, theirs in pairs))

    def __sub__(self, other: Throughput) -> Throughput:
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Throughput(*(mine - theirs for mine, theirs in pairs))


class ThroughputMonitor(pl.Callback):
    """Counts on the CPU, from the batches' own numbers, and logs at the logging cadence.

    The device is waited for only when it logs. The clock runs from the first training step on and
    stops while the run validates or saves a checkpoint.

    Args:
        max_tokens: Capacity of a row; None logs no fill.

    Attributes:
        total: Everything up to the newest logging step.
        latest: What was counted between the two newest logging steps.
    """

    def __init__(self, max_tokens: int | None = None) -> None:
        self.max_tokens = max_tokens
        self.total = Throughput()
        self.latest = Throughput()
        self._first: Throughput | None = None
        self._counter: FlopCounter | None = None
        self._peak: float | None = None
        self._tokens = 0
        self._rows = 0
        self._flops = 0.0
        self._clock = _Clock()

    @property
    def steady(self) -> Throughput:
        """Without the first interval, in which kernels compile, unless it is the only one."""
        if self._first is None or self._first == self.total:
            return self.total
        return self.total - self._first

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reads the sizes of the model and the name of the device."""
        assert isinstance(pl_module.model, nn.Module)
        self._counter = FlopCounter.of(pl_module.model)
        if pl_module.device.type == "cuda":
            self._peak = peak_flops(torch.cuda.get_device_name(pl_module.device))
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: PackedBatch, batch_idx: int
    ) -> None:
        """Starts the clock, at the first batch and after every pause."""
        self._clock.resume()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: PackedBatch,
        batch_idx: int,
    ) -> None:
        """Counts the batch; logs at the cadence."""
        assert self._counter is not None
        self._tokens += batch.num_tokens
        self._rows += 1
        self._flops += self._counter.step_flops(batch.lengths)
        if at_log_step(trainer):
            self._close_interval(trainer, pl_module)
            self._log(trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops the clock until the next batch."""
        self._clock.pause(pl_module.device)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Stops the clock until the next batch."""
        self._clock.pause(pl_module.device)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Counts the steps after the last logging step into the total."""
        if self._rows:
            self._close_interval(trainer, pl_module)

    def _close_interval(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Joins the ranks' counts; waits for the device."""
        seconds = self._clock.lap(pl_module.device)
        capacity = float(self._rows * self.max_tokens) if self.max_tokens else 0.0
        counts = torch.tensor([float(self._tokens), capacity, self._flops], dtype=torch.float64).to(
            pl_module.device
        )
        if trainer.world_size > 1:
            dist.all_reduce(counts)
        tokens, capacity, flops = counts.tolist()
        self.latest = Throughput(tokens, capacity, flops, seconds)
        self.total = self.total + self.latest
        if self._first is None:
            self._first = self.latest
        self._tokens = self._rows = 0
        self._flops = 0.0

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        latest = self.latest
        metrics = {
            "throughput/tokens_per_second": latest.tokens_per_second,
            "throughput/tokens": self.total.tokens,
            "memory/peak_gib": peak_memory_gib(pl_module.device),
        }
        if latest.fill is not None:
            metrics["throughput/fill"] = latest.fill
        if latest.seconds > 0:
            per_device = latest.flops / latest.seconds / trainer.world_size
            metrics["throughput/tflops_per_device"] = per_device / 1e12
            if self._peak is not None:
                metrics["throughput/mfu"] = per_device / self._peak
        for name, value in metrics.items():
            pl_module.log(name, torch.tensor(value, dtype=torch.float64))


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory in GiB: allocated by torch on a GPU, resident of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class _Clock:
    """Seconds of training; waits for the device at every reading."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._seconds = 0.0

    def resume(self) -> None:
        """Starts the clock if it stands."""
        if self._since is None:
            self._since = time.perf_counter()

    def pause(self, device: torch.device) -> None:
        """Stops the clock if it runs."""
        if self._since is not None:
            _wait(device)
            self._seconds += time.perf_counter() - self._since
            self._since = None

    def lap(self, device: torch.device) -> float:
        """Seconds since the last lap, without pauses."""
        running = self._since is not None
        self.pause(device)
        seconds, self._seconds = self._seconds, 0.0
        if running:
            self.resume()
        return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
