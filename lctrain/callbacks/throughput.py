"""ThroughputMonitor: logs tokens per second, model FLOPs, MFU, row fill and peak memory."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import astuple, dataclass
from typing import Any

import lightning.pytorch as pl
import torch

from lctrain.batch import PackedBatch
from lctrain.callbacks.batches import BatchView, ReadBatch, view_batch
from lctrain.callbacks.targets import find_target
from lctrain.distributed import Topology
from lctrain.flops import FlopCounter, peak_flops
from lctrain.log_steps import at_log_step
from lctrain.peak_memory import peak_bytes, restart_peak

EARLIER_TOKENS = "throughput_tokens"  # key in a checkpoint


@dataclass(frozen=True)
class Throughput:
    """Counts and seconds of an interval of training. Counts are summed over all ranks.

    Attributes:
        tokens: Number of tokens, without padding.
        capacity: Number of tokens that would fit into the rows; 0 if unknown.
        flops: Model FLOPs of forward and backward.
        seconds: Seconds in training steps, without validation and checkpoints.
    """

    tokens: float = 0.0
    capacity: float = 0.0
    flops: float = 0.0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of all ranks together."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def fill(self) -> float | None:
        """Fraction of the rows' capacity that holds tokens; None if the capacity is unknown."""
        return self.tokens / self.capacity if self.capacity > 0 else None

    def __add__(self, other: Throughput) -> Throughput:
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Throughput(*(mine + theirs for mine, theirs in pairs))

    def __sub__(self, other: Throughput) -> Throughput:
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Throughput(*(mine - theirs for mine, theirs in pairs))


class ThroughputMonitor(pl.Callback):
    """Logs tokens per second, row fill, model FLOPs utilisation and peak memory at logging steps.

    A batch is a PackedBatch or a mapping with transformers' names. Lengths in a mapping are
    tensors: they are read at logging steps, so that other steps do not wait for the device. The
    monitor also waits when a validation or a checkpoint begins, since these do not count as
    training time.

    Args:
        max_tokens: Capacity of a row in tokens; None logs no fill.
        model: Attribute path of the model whose FLOPs are counted; None takes the only model of the
            module, or the only model with trainable weights.
        read_batch: Function from a batch to a PackedBatch or a mapping with transformers' names;
            None if batches are one of them.

    Raises:
        ValueError: if the model is not found, or a batch cannot be read.

    The metric `throughput/tokens` counts the tokens of the whole run. A checkpoint holds the count,
    so a resumed run continues it. Speeds are those of this process.

    Attributes:
        total: Totals from the start of training in this process to the last logging step.
        latest: Totals between the last two logging steps.
    """

    def __init__(
        self,
        max_tokens: int | None = None,
        model: str | None = None,
        read_batch: ReadBatch | None = None,
    ) -> None:
        self.max_tokens = max_tokens
        self.model = model
        self.read_batch = read_batch
        self.total = Throughput()
        self.latest = Throughput()
        self._earlier_tokens = 0.0
        self._first: Throughput | None = None
        self._counter: FlopCounter | None = None
        self._peak: float | None = None
        self._counted = Throughput()
        self._unread: list[BatchView] = []
        self._clock = _Clock()

    @property
    def steady(self) -> Throughput:
        """Totals without the first logging interval, in which kernels compile.

        If there is only one interval, the totals of that interval.
        """
        if self._first is None or self._first == self.total:
            return self.total
        return self.total - self._first

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reads the model's sizes and the device's peak FLOPs, and resets the counts."""
        self._counted, self._unread = Throughput(), []
        self._counter = FlopCounter.of(find_target(pl_module, self.model, self))
        if pl_module.device.type == "cuda":
            self._peak = peak_flops(torch.cuda.get_device_name(pl_module.device))
            restart_peak(pl_module.device)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Starts the clock at the first batch and after every pause."""
        self._clock.resume()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Counts the tokens of a batch; at logging steps, logs the metrics."""
        view = view_batch(batch, self.read_batch)
        if isinstance(view.content, PackedBatch):
            self._counted += self._count(view)
        else:
            self._unread.append(view.without_tokens())
        if at_log_step(trainer):
            self._close_interval(trainer, pl_module)
            self._log(trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops the clock until the next batch."""
        self._clock.pause(pl_module.device)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Stops the clock until the next batch, and saves the number of tokens so far."""
        self._clock.pause(pl_module.device)
        counted = sum(map(self._count, self._unread), self._counted)
        (tokens,) = _sum_over_ranks([counted.tokens], trainer, pl_module.device)
        checkpoint[EARLIER_TOKENS] = self._earlier_tokens + self.total.tokens + tokens

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restores the number of tokens of the run so far."""
        self._earlier_tokens = checkpoint.get(EARLIER_TOKENS, 0.0) - self.total.tokens

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Adds the steps after the last logging step to the totals."""
        if self._unread or self._counted.tokens:
            self._close_interval(trainer, pl_module)

    def _close_interval(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sums the counts of all ranks into `latest` and `total`; waits for the device."""
        seconds = self._clock.lap(pl_module.device)
        counted = sum(map(self._count, self._unread), self._counted)
        tokens, capacity, flops = _sum_over_ranks(
            [counted.tokens, counted.capacity, counted.flops], trainer, pl_module.device
        )
        self.latest = Throughput(tokens, capacity, flops, seconds)
        self.total = self.total + self.latest
        if self._first is None:
            self._first = self.latest
        self._counted, self._unread = Throughput(), []

    def _count(self, view: BatchView) -> Throughput:
        """Returns tokens, capacity and FLOPs of one micro-batch of this rank, without time."""
        assert self._counter is not None
        return Throughput(
            tokens=float(view.num_tokens),
            capacity=view.rows * (self.max_tokens or 0) / view.ranks,
            flops=self._counter.step_flops(view.lengths, view.parents) / view.ranks,
        )

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        latest = self.latest
        metrics = {
            "throughput/tokens_per_second": latest.tokens_per_second,
            "throughput/tokens": self._earlier_tokens + self.total.tokens,
            "memory/peak_gib": peak_memory_gib(pl_module.device),
        }
        if latest.fill is not None:
            metrics["throughput/fill"] = latest.fill
        if latest.seconds > 0:
            per_device = latest.flops / latest.seconds / Topology.of(trainer).size
            metrics["throughput/tflops_per_device"] = per_device / 1e12
            if self._peak is not None:
                metrics["throughput/mfu"] = per_device / self._peak
        for name, value in metrics.items():
            pl_module.log(name, torch.tensor(value, dtype=torch.float64))


def peak_memory_gib(device: torch.device) -> float:
    """Returns the peak memory in GiB: allocated by torch on a GPU, else used by this process."""
    if device.type == "cuda":
        return peak_bytes(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _sum_over_ranks(counts: list[float], trainer: pl.Trainer, device: torch.device) -> list[float]:
    """Returns the sums of the counts over all ranks. All ranks must call it."""
    ranks = Topology.of(trainer)
    if ranks.size == 1:
        return counts
    sums = torch.tensor(counts, dtype=torch.float64).to(device)
    return list(ranks.sum(sums).tolist())


class _Clock:
    """Measures seconds of training; waits for the device whenever it is read or stopped."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._seconds = 0.0

    def resume(self) -> None:
        """Starts the clock if it is stopped."""
        if self._since is None:
            self._since = time.perf_counter()

    def pause(self, device: torch.device) -> None:
        """Stops the clock if it runs."""
        if self._since is not None:
            _wait(device)
            self._seconds += time.perf_counter() - self._since
            self._since = None

    def lap(self, device: torch.device) -> float:
        """Returns the seconds since the last call of `lap`, without pauses."""
        running = self._since is not None
        self.pause(device)
        seconds, self._seconds = self._seconds, 0.0
        if running:
            self.resume()
        return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
