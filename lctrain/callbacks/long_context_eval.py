"""LongContextEval: runs evaluation tasks on the model in training, within a time budget."""

from __future__ import annotations

import dataclasses
import logging
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lctrain.callbacks.held_out import held_out_documents, tokenizer_of
from lctrain.callbacks.targets import find_target
from lctrain.config import EvalConfig, NeedleConfig, PasskeyConfig, RulerConfig
from lctrain.distributed import Topology
from lctrain.distributed.sharding import through_root
from lctrain.eval.cells import Cell
from lctrain.eval.reading import GivenReading
from lctrain.eval.records import Result, Subject, Table
from lctrain.eval.registry import make_task
from lctrain.eval.run_task import Run, progress_bar
from lctrain.eval.untouched import untouched
from lctrain.generation.pool_size import bytes_beside
from lctrain.instances import require_int
from lctrain.limits import check_lengths, require
from lctrain.loggers import log_evaluation, log_picture
from lctrain.peak_memory import split_peak
from lctrain.warn import warn_once

log = logging.getLogger(__name__)

GIB = 2**30
Done = dict[Cell, Result]


class LongContextEval(pl.Callback):
    """Runs tasks of `lctrain-eval` every n optimizer steps, on the model as it is trained.

    The losses of the training are the same to the bit with and without the callback: training modes
    and random numbers are restored, even after an error. Ranks with a copy of the model each
    compute a part of the cells; ranks that share a model compute all cells together. Cells that
    would exceed the budget, or that cannot be computed, are left out with a warning; short lengths
    come first.

    Args:
        lengths: Context lengths in tokens.
        every_n_steps: Optimizer steps between two evaluations.
        tasks: Names of tasks of lctrain-eval.
        budget_s: Seconds that one evaluation may take; None for no limit. A cell that was begun is
            finished.
        max_tokens: Largest number of tokens in a forward pass; None takes the longest length.
        documents: Number of held-out documents, the longest ones; None for all.
        passkey: Settings of the task passkey; None for five keys at three depths.
        needle: Settings of the task needle; None for two needles at three depths.
        ruler: Settings of the task ruler; None for two prompts of each task.
        held_out: Held-out documents as sequences of token ids; None takes those of the data module.
        model: Attribute path of the model in the module; None takes the only model.
        cache_gib: Most memory in GiB of the keys and values of prompts that are answered. None
            leaves as much of a GPU free as the training has needed at its peak.

    Raises:
        ValueError: if a setting is out of range; in `on_fit_start`, if a task cannot be run on the
            model, the tokenizer or the documents.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        every_n_steps: int,
        tasks: Sequence[str] = ("perplexity",),
        budget_s: float | None = None,
        max_tokens: int | None = None,
        documents: int | None = 16,
        passkey: PasskeyConfig | None = None,
        needle: NeedleConfig | None = None,
        ruler: RulerConfig | None = None,
        held_out: Sequence[Sequence[int]] | None = None,
        model: str | None = None,
        cache_gib: float | None = None,
    ) -> None:
        off = "Set callbacks.long_context_eval=null to switch the callback off."
        require_int("every_n_steps", every_n_steps, 1, off)
        require(
            budget_s is None or budget_s > 0,
            f"budget_s must be above 0, got {budget_s}. Use null for no limit.",
        )
        require_int("documents", 1 if documents is None else documents, 1, off)
        require(
            cache_gib is None or 0 < cache_gib < math.inf,
            f"cache_gib must be a finite number above 0, got {cache_gib}. Use null to leave the "
            "training its memory.",
        )
        require(len(tasks) > 0, f"tasks must name at least one, got none. {off}")
        self.lengths = check_lengths(lengths, max_tokens)
        self.max_tokens = self.lengths[-1] if max_tokens is None else max_tokens
        self.every_n_steps = every_n_steps
        self.budget_s = budget_s
        self.held_out = held_out
        self.model = model
        depths = [0.0, 0.5, 1.0]
        config = EvalConfig(
            lengths=list(self.lengths),
            documents=documents,
            passkey=passkey or PasskeyConfig(depths=depths, keys_per_cell=5),
            needle=needle or NeedleConfig(depths=depths, needles=2),
            ruler=ruler or RulerConfig(items=2),
        )
        self.tasks = [make_task(name, config) for name in dict.fromkeys(tasks)]
        self.cache_gib = cache_gib
        self._runs: list[Run] = []
        self._step = 0
        self._peak = 0  # bytes on the GPU, of the training alone

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prepares all tasks before training.

        Raises:
            ValueError: if a task cannot be run on the model, the tokenizer or the documents.
        """
        subject = Subject(
            model=find_target(pl_module, self.model, self),
            tokenizer=tokenizer_of(trainer),
            documents=held_out_documents(trainer, self.held_out, type(self).__name__),
        )
        device = trainer.strategy.root_device
        with untouched(subject.model):
            self._runs = [
                Run.prepared(
                    task,
                    subject,
                    [GivenReading()],
                    check_lengths(task.lengths or self.lengths, self.max_tokens),
                    max_tokens=self.max_tokens,
                    device=device,
                )
                for task in self.tasks
            ]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stores the optimizer step at which the run starts or resumes."""
        self._step = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Evaluates after every n-th optimizer step, and logs `val/<task>_<length>`.

        A batch with several optimizer steps is followed by one evaluation at most.
        """
        before, self._step = self._step, trainer.global_step
        if self._step // self.every_n_steps == before // self.every_n_steps:
            return
        model = self._runs[0].subject.model
        device = trainer.strategy.root_device
        self._bound_cache(device)
        with untouched(model):  # loggers too may draw random numbers
            with trainer.precision_plugin.forward_context():
                done = through_root(trainer, self._compute, Topology.of(trainer))
            if Topology.of(trainer).is_first:
                self._log(trainer, done)
        if device.type == "cuda":
            split_peak(device)
        trainer.strategy.barrier("LongContextEval")

    def _bound_cache(self, device: torch.device) -> None:
        """Bounds the cache of the tasks, so that the next step of the training has its memory."""
        cache_gib = self.cache_gib
        if cache_gib is None and device.type == "cuda":
            self._peak = max(self._peak, torch.cuda.max_memory_allocated(device))
            cache_gib = max(bytes_beside(device, self._peak), 1) / GIB
        self._runs = [dataclasses.replace(run, cache_gib=cache_gib) for run in self._runs]

    def _compute(self, ranks: Topology) -> Done:
        """Returns the results of the cells that the budget allows, of all ranks.

        A result without items is that of a cell that cannot be computed.
        """
        together = ranks.is_sharded or ranks.context > 1 or ranks.size == 1
        cells = [(run, cell) for run in self._runs for cell in run.cells()]
        cells.sort(key=lambda pair: pair[1].length)  # the order of tasks is kept
        mine = cells if together else cells[ranks.rank :: ranks.size]
        done: Done = {}
        began = time.monotonic()
        alone = nullcontext() if together else ranks.failing_together()
        with alone, progress_bar(0, "token", shown=False) as bar:
            for run, cell in mine:
                if self._spent(began, ranks if together else Topology()):
                    break
                try:
                    run.compute_cell(cell, done, bar)
                except ValueError as error:  # such as no key tokens yet; the training goes on
                    done[cell] = Result(())
                    warn_once(
                        log, "LongContextEval left out %s at %d: %s", cell.task, cell.length, error
                    )
        if not together:
            done = _gathered(done, ranks)
        left = len(cells) - len(done)
        if left and ranks.is_first:
            warn_once(
                log,
                "LongContextEval left out %d of %d cells, which budget_s=%s did not allow. Raise "
                "it, or ask for less.",
                left,
                len(cells),
                self.budget_s,
            )
        return done

    def _spent(self, began: float, ranks: Topology) -> bool:
        """Whether the budget is spent. Ranks that compute together follow the first one."""
        if self.budget_s is None:
            return False
        return bool(ranks.of_first(time.monotonic() - began > self.budget_s))

    def _log(self, trainer: pl.Trainer, done: Done) -> None:
        done = {cell: result for cell, result in done.items() if result.items}
        tables = [table for run in self._runs if (table := _table(run, done)) is not None]
        step = trainer.global_step - 1
        metrics = {
            f"val/{name}": value for table in tables for name, value in table.metrics().items()
        }
        for logger in trainer.loggers:
            if metrics:
                logger.log_metrics(metrics, step=step)
        shown = [one for one in trainer.loggers if _shows(one)]
        with tempfile.TemporaryDirectory() as folder:
            for table in tables if shown else ():
                picture = table.save(Path(folder))["png"]
                for logger in shown:
                    log_evaluation(logger, table.as_dicts(), picture, f"val/{table.stem}")
                    log_picture(logger, f"val/{table.stem}_plot", picture, step)


def _shows(logger: Any) -> bool:
    """Whether a logger can show tables or pictures."""
    return hasattr(logger, "log_table") or hasattr(getattr(logger, "experiment", None), "add_image")


def _table(run: Run, done: Mapping[Cell, Result]) -> Table | None:
    """Returns the table of the lengths that are done; None without any row."""
    reading = run.readings[0]
    lengths = tuple(
        n for n in run.lengths if Cell(run.task.name, reading.method, run.same(reading, n)) in done
    )
    if not lengths:
        return None
    table = dataclasses.replace(run, lengths=lengths).table(dict(done))
    return table if table.as_dicts() else None


def _gathered(done: Done, ranks: Topology) -> Done:
    """Returns the results of all ranks together."""
    return {cell: result for part in ranks.gather(done) for cell, result in part.items()}
