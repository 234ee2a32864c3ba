"""RunReport: the report that a training run prints and saves at its end."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import lightning.pytorch as pl

from lctrain.callbacks import StepCheckpoint, ThroughputMonitor
from lctrain.callbacks.throughput import peak_memory_gib
from lctrain.closing import Closing
from lctrain.data.packing import PackingReport
from lctrain.distributed import Topology
from lctrain.loggers import MetricsCSV
from lctrain.module import LongContextModule
from lctrain.next_command import pasteable
from lctrain.pluralize import pluralize
from lctrain_kernels.strict_json import write_json


@dataclass(frozen=True)
class RunReport:
    """Results of one training run.

    Attributes:
        steps: Optimizer steps in total, including those before a resume.
        first_loss: Training loss of the first step.
        last_loss: Training loss of the last step; None if this process took no step.
        held_out_first: Held-out loss before the first step.
        held_out_last: Held-out loss after the last step.
        held_out_sets: For each held-out set, by its name, its loss before the first step and after
            the last step, if there are several sets.
        tokens_per_second: Tokens per second of all ranks together, without the first logging
            interval; None if it was not measured.
        peak_memory_gib: Peak memory in GiB: allocated on the GPU, or of this process without a GPU.
        fill: Tokens in the training rows, as a fraction of what the rows could hold.
        data: Description of the training rows in one line: see `describe_rows`.
        packing: Counts of the training rows, as text: see PackingReport.
        held_out_packing: Counts of the held-out rows, as text: see PackingReport.
        imbalance: Attention work of the heaviest rank of each step over the mean of all ranks, see
            `lctrain.data.order.imbalance`; None with one rank.
        perplexities: Pairs (context length, perplexity).
        findings: Sentences about the results of the closing evaluation, by name.
        folder: Folder of the run.
        paths: Paths of the written files, by name.
        evaluation_arguments: Arguments with which lctrain-eval reads the same held-out text;
            None if it cannot read the model.
    """

    steps: int
    first_loss: float | None
    last_loss: float | None
    held_out_first: float | None
    held_out_last: float | None
    tokens_per_second: float | None
    peak_memory_gib: float
    fill: float
    data: str
    packing: str
    held_out_packing: str
    imbalance: float | None
    perplexities: tuple[tuple[int, float], ...]
    findings: dict[str, str]
    folder: Path
    paths: dict[str, Path]
    evaluation_arguments: tuple[str, ...] | None = ()
    held_out_sets: dict[str, tuple[float, float]] = field(default_factory=dict)

    def __str__(self) -> str:
        """Returns at most ten lines for new users; report.json holds all figures."""
        lines = [
            f"trained   {pluralize(self.steps, 'step')}, {_number(self.tokens_per_second, ',.0f')} "
            "tokens/s, "
            f"{self.peak_memory_gib:.2f} GiB of memory",
            f"loss      {_change(self.held_out_first, self.held_out_last)} on held-out text, "
            f"{_change(self.first_loss, self.last_loss)} in training (lower is better)",
            f"data      {self.data}",
        ]
        if self.held_out_sets:
            sets = [f"{name} {_change(*pair)}" for name, pair in self.held_out_sets.items()]
            lines.insert(2, f"held out  {', '.join(sets)}")
        lines += [f"{name:<9} {sentence}" for name, sentence in self.findings.items() if sentence]
        pictures = [path for name, path in self.paths.items() if name.endswith("plot")]
        if pictures:
            lines.append(f"pictures  {', '.join(map(shorten, pictures))}")
        if "model" in self.paths:
            lines.append(f"model     {shorten(self.paths['model'])}, which transformers can load")
        lines.append(f"details   {shorten(self.folder / 'report.json')} and the files beside it")
        if "model" in self.paths and self.evaluation_arguments is not None:
            lines.append(
                " ".join(
                    (
                        f"next      {command('lctrain-eval')}",
                        pasteable("model", shorten(self.paths["model"])),
                        *self.evaluation_arguments,
                    )
                )
            )
        return "\n".join(lines)

    def save(self, folder: Path) -> None:
        """Writes the printed report to report.txt, and all figures to report.json.

        A figure that is not finite, such as a loss of NaN, is null there.

        Args:
            folder: Folder of the run.
        """
        (folder / "report.txt").write_text(f"{self}\n")
        write_json(folder / "report.json", asdict(self), default=str)


def summarize(
    trainer: pl.Trainer,
    module: LongContextModule,
    closing: Closing,
    folder: Path,
    evaluation_arguments: Sequence[str] | None = (),
) -> RunReport:
    """Builds the report of a finished run.

    Args:
        trainer: Trainer that has run `fit`.
        module: Module that has been trained.
        closing: Results of the closing evaluation. Its paths include the exported model.
        folder: Folder of the run.
        evaluation_arguments: Arguments with which lctrain-eval reads the same held-out text;
            None if it cannot read the model.
    """
    found = dict(closing.paths)
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
        data=describe_rows(packing),
        packing=str(packing),
        held_out_packing=describe_sets(data.held_out_reports),
        imbalance=data.imbalance if Topology.of(trainer).data_size > 1 else None,
        perplexities=closing.perplexities,
        findings=closing.findings,
        folder=folder,
        paths=found,
        evaluation_arguments=None if evaluation_arguments is None else tuple(evaluation_arguments),
        held_out_sets={
            name: (losses[0][1], losses[-1][1])
            for name, losses in module.held_out_set_losses.items()
        },
    )


def describe_rows(packing: PackingReport) -> str:
    """Describes the training rows in one line, with the documents that were cut or left out.

    Args:
        packing: Counts of the training rows.
    """
    text = f"{pluralize(packing.tokens, 'token')} of {pluralize(packing.documents, 'document')}"
    text += f", in rows that are {packing.fill:.1%} full"
    lost = {
        "cut off": packing.truncated,
        "dropped": packing.dropped,
        "empty": packing.dropped_empty,
        "unreadable": packing.dropped_unreadable,
    }
    found = [f"{number:,} {what}" for what, number in lost.items() if number]
    shares = [f"{part.name} {part.tokens / packing.tokens:.1%}" for part in packing.sources]
    return "; ".join([text, *(", ".join(words) for words in (shares, found) if words)])


def describe_sets(reports: Mapping[str, PackingReport]) -> str:
    """Returns the counts of the held-out rows as text, with names if there are several sets.

    Args:
        reports: Counts of the rows of every set.
    """
    if len(reports) == 1:
        return "".join(map(str, reports.values()))
    return "; ".join(f"{name}: {report}" for name, report in reports.items())


def command(name: str) -> str:
    """Returns the command that runs a console script: its name, or its path if it is not in PATH.

    Args:
        name: Name of the script.
    """
    beside = Path(sys.executable).with_name(name)
    if shutil.which(name) is None and beside.is_file():
        return shorten(beside)
    return name


def shorten(path: Path) -> str:
    """Returns a path relative to the current folder if it lies inside; other paths unchanged."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _change(first: float | None, last: float | None) -> str:
    return f"{_number(first, '.4f')} -> {_number(last, '.4f')}"


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)
