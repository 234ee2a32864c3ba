"""The report that a run prints at its end."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import lightning.pytorch as pl

from lctrain.callbacks import StepCheckpoint, ThroughputMonitor
from lctrain.callbacks.throughput import peak_memory_gib
from lctrain.loggers import MetricsCSV
from lctrain.module import LongContextModule


@dataclass(frozen=True)
class RunReport:
    """The outcome of one run.

    Attributes:
        steps: Optimizer steps in total, including those before a resume.
        first_loss: Training loss of the first step.
        last_loss: Training loss of the last step; None if this process took no step.
        held_out_first: Held-out loss before the first step.
        held_out_last: Held-out loss after the last step.
        tokens_per_second: Real tokens of all ranks, without the first logging interval.
        peak_memory_gib: Peak memory in GiB: of the device on a GPU, else of this process.
        fill: Real tokens over row capacity of the whole training split.
        packing: Counts of the training split, documents cut or dropped among them.
        held_out_packing: Packing counts of the held-out split.
        imbalance: Attention work of the heaviest rank of every step over that of the mean, as in
            `lctrain.data.order`; None with one rank.
        perplexities: [(context length, perplexity)].
        paths: Paths of the written files, by name.
    """

    steps: int
    first_loss: float | None
    last_loss: float | None
    held_out_first: float | None
    held_out_last: float | None
    tokens_per_second: float | None
    peak_memory_gib: float
    fill: float
    packing: str
    held_out_packing: str
    imbalance: float | None
    perplexities: tuple[tuple[int, float], ...]
    paths: dict[str, Path]

    def __str__(self) -> str:
        lines = [
            f"steps            {self.steps:,}",
            f"training loss    {_change(self.first_loss, self.last_loss)}",
            f"held-out loss    {_change(self.held_out_first, self.held_out_last)}",
            f"speed            {_number(self.tokens_per_second, ',.0f')} real tokens/s",
            f"peak memory      {self.peak_memory_gib:.2f} GiB",
            f"fill             {self.fill:.4f}",
            f"packing          {self.packing}",
            f"held-out packing {self.held_out_packing}",
        ]
        if self.imbalance is not None:
            lines.append(f"imbalance        {self.imbalance:.3f} heaviest rank / mean attention")
        if self.perplexities:
            cells = ", ".join(f"{length:,}: {value:.1f}" for length, value in self.perplexities)
            lines.append(f"perplexity by length  {cells}")
        lines += [f"{name:<16} {path}" for name, path in self.paths.items()]
        if "model" in self.paths:
            lines.append(f"next             lctrain-eval model={self.paths['model']}")
        return "\n".join(lines)

    def save(self, folder: Path) -> None:
        """Writes report.txt, as it is printed, and report.json, with every figure.

        Args:
            folder: Folder of the run.
        """
        (folder / "report.txt").write_text(f"{self}\n")
        content = json.dumps(asdict(self), indent=2, default=str)
        (folder / "report.json").write_text(f"{content}\n")


def summarize(
    trainer: pl.Trainer,
    module: LongContextModule,
    perplexities: tuple[tuple[int, float], ...],
    paths: dict[str, Path],
) -> RunReport:
    """Collects the report from the objects of a finished run.

    Args:
        trainer: After `fit`.
        module: After `fit`.
        perplexities: [(context length, perplexity)] of the closing evaluation.
        paths: Paths of the files besides checkpoint and metrics, by name.
    """
    found = dict(paths)
    speed = None
    for callback in trainer.callbacks:
        if isinstance(callback, StepCheckpoint) and callback.last_path.exists():
            found["checkpoint"] = callback.last_path
        if isinstance(callback, ThroughputMonitor) and callback.total.seconds > 0:
            speed = callback.steady.tokens_per_second
    for logger in trainer.loggers:
        if isinstance(logger, MetricsCSV) and logger.path.exists():
            found["metrics"] = logger.path
    held_out = [loss for _, loss in module.held_out_losses]
    data = trainer.datamodule
    packing = data.packing_report
    return RunReport(
        steps=trainer.global_step,
        first_loss=None if module.first_loss is None else float(module.first_loss),
        last_loss=None if module.last_loss is None else float(module.last_loss),
        held_out_first=held_out[0] if held_out else None,
        held_out_last=held_out[-1] if held_out else None,
        tokens_per_second=speed,
        peak_memory_gib=peak_memory_gib(trainer.strategy.root_device),
        fill=packing.fill,
        packing=str(packing),
        held_out_packing=str(data.held_out_report),
        imbalance=data.imbalance if trainer.world_size > 1 else None,
        perplexities=perplexities,
        paths=found,
    )


def _change(first: float | None, last: float | None) -> str:
    return f"{_number(first, '.4f')} -> {_number(last, '.4f')}"


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)
