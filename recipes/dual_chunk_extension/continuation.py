"""Stage 4: continues training on longer texts, with the exact and the published gradient.

Before that, it measures the held-out loss in documents of one trained window and of eight windows.
If both losses are equal, training on long documents starts without damage that it must first
repair.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lctrain.build import build_datamodule
from lctrain.config import DataConfig
from lctrain.eval.plots import INK, new_figure, style_axes
from lctrain.loss import causal_lm_loss, evaluation_mode
from lctrain.models import patch_model
from lctrain.recipes.dual_chunk_extension.experiment import Experiment, run_training
from lctrain.recipes.dual_chunk_extension.published import published_gradient
from lctrain.recipes.dual_chunk_extension.scale import TRAIN_RATIO

GRADIENTS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "exact": nullcontext,
    "published": published_gradient,
}
COLOURS = {"exact": "#0b6e99", "published": "#d55e00"}


def continue_training(experiment: Experiment) -> None:
    """Measures the first losses, trains with each gradient, and writes the results and a plot."""
    window = experiment.scale.window
    long = TRAIN_RATIO * window
    data = replace(experiment.data(), passkey_fraction=0.0, max_tokens=4 * long)
    before = {
        f"plain, {window} tokens": held_out_loss(experiment.model, data, window, "flash"),
        f"plain, {long} tokens": held_out_loss(experiment.model, data, long, "flash"),
        f"dual chunk, {long} tokens": held_out_loss(experiment.model, data, long, "dual_chunk"),
    }
    first, _, last = before.values()
    runs = {name: _train(experiment, long, name) for name in GRADIENTS}
    experiment.save(
        "continuation",
        {
            "held_out_loss_before": before,
            "ratio_at_step_0": last / first,
            "runs": runs,
        },
    )
    _write_csv(experiment.output / "continuation.csv", runs)
    _plot(experiment.output / "continuation.png", runs, first, window, long)
    for name, loss in before.items():
        print(f"held-out loss before, {name}: {loss:.4f}")
    for name, run in runs.items():
        print(
            f"held-out loss, {name} gradient: {run['held_out'][0]:.4f} -> {run['held_out'][1]:.4f}"
        )


def held_out_loss(model_folder: Path, data: DataConfig, limit: int, attention: str) -> float:
    """Returns the mean loss per held-out token, with documents cut to at most `limit` tokens.

    All tokens are scored except the first of each piece, so different limits score nearly the same
    tokens.
    """
    from transformers import AutoModelForCausalLM

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model: nn.Module = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    model.to(device)
    module = build_datamodule(replace(data, max_document_tokens=limit, num_workers=0))
    module.setup()
    total, tokens = 0.0, 0
    with patch_model(model, attention), evaluation_mode(model):
        for batch in module.val_dataloader():
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss, _ = causal_lm_loss(model, batch.to(device))
            total += loss.item()
            tokens += batch.num_valid_tokens
    return total / tokens


def _train(experiment: Experiment, long: int, gradient: str) -> dict[str, Any]:
    folder = experiment.output / f"continued_{gradient}"
    scale = experiment.scale
    with GRADIENTS[gradient]():
        report = run_training(
            [
                *(o for o in experiment.short_training() if not o.startswith("model")),
                "model=hf",
                f"model.name_or_path={experiment.model}",
                f"data.tokenizer={experiment.model}",
                f"data.max_document_tokens={long}",
                "data.passkey_fraction=0",
                "attention=dual_chunk",
                f"attention.window={scale.window}",
                "optim.schedule=constant",
                "optim.warmup_fraction=0.05",
                "trainer.log_every_n_steps=1",
                "evaluation.enabled=false",
                "export=false",
                "callbacks.checkpoint=null",
                *scale.continued,
            ],
            folder,
        )
    with (folder / "metrics.csv").open() as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")]
    return {"train": losses, "held_out": [report.held_out_first, report.held_out_last]}


def _write_csv(path: Path, runs: dict[str, dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *runs])
        for step, losses in enumerate(zip(*(run["train"] for run in runs.values()), strict=True)):
            writer.writerow([step, *losses])


def _plot(
    path: Path, runs: dict[str, dict[str, Any]], short_loss: float, window: int, long: int
) -> None:
    figure = new_figure()
    axes = figure.add_subplot()
    for name, run in runs.items():
        losses = _smooth(run["train"])
        axes.plot(losses, color=COLOURS[name], label=f"{name} gradient", linewidth=1.5)
    axes.set_xlabel("Optimizer step", color=INK)
    axes.set_ylabel("Training loss, smoothed", color=INK)
    style_axes(
        axes,
        f"Training goes on at {long:,} tokens",
        f"dual chunk attention; held-out loss at {window:,} tokens before: {short_loss:.3f}",
    )
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def _smooth(values: Sequence[float], share: float = 0.9) -> list[float]:
    """Returns an exponential moving average with bias correction for the first values."""
    smoothed, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = share * mean + (1 - share) * value, share * weight + (1 - share)
        smoothed.append(mean / weight)
    return smoothed
