"""Continues training on longer texts, by dual chunk attention and by YaRN.

Persuasion is held out. The model may know it, and training on five other novels of the author
lowers its loss at every length. So the results are gains: how much less the same tokens of
Persuasion cost with a context of `scale.long` tokens than with one of the trained window.
"""

from __future__ import annotations

import csv
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lctrain.config import AttentionConfig
from lctrain.recipes.dual_chunk_extension.experiment import run_training
from lctrain.recipes.output import remove_stopped, require_same_settings
from lctrain.recipes.smollm2.experiment import Experiment, rows_of
from lctrain.recipes.smollm2.novels import HELD_OUT, NOVELS
from lctrain.recipes.smollm2.stages import document_tokens
from lctrain_kernels.strict_json import write_json

WAYS = ("dual_chunk", "yarn")


@dataclass(frozen=True)
class Way:
    """A way to read long texts, in training and in the evaluations before and after it.

    Attributes:
        model: Folder of the model.
        attention: Attention that replaces the model's own.
        overrides: Hydra overrides of the training that choose this attention.
    """

    model: Path
    attention: AttentionConfig
    overrides: tuple[str, ...]


def continue_training(experiment: Experiment) -> None:
    """Measures the held-out novel, trains on the others, and measures again, in each way."""
    settings = {"training": experiment.scale.training, "overrides": experiment.overrides}
    require_same_settings(
        experiment.output / "continue", {name: list(values) for name, values in settings.items()}
    )
    for name in WAYS:
        resumed = experiment.has_begun(f"{name}_before")
        started = time.perf_counter()
        way = _way(experiment, name)
        before = _held_out(experiment, f"{name}_before", way.model, way.attention)
        trained = experiment.output / f"{name}_trained"
        if not (trained / "report.json").exists():
            remove_stopped(trained)
            _train(experiment, way, trained)
        after = _held_out(experiment, f"{name}_after", trained / "model", way.attention)
        content = {
            "window": experiment.scale.window,
            "long": experiment.scale.long,
            "steps": json.loads((trained / "report.json").read_text())["steps"],
            "train_loss": _losses(trained / "metrics.csv"),
            "before": before,
            "after": after,
        }
        experiment.save(f"continue_{name}", content, time.perf_counter() - started, resumed)
        for when, rows in (("before", before), ("after", after)):
            losses = ", ".join(f"{row['loss']:.4f} at {row['length']:,}" for row in rows)
            print(f"{name}, {when} training: {losses} tokens", flush=True)


def _way(experiment: Experiment, name: str) -> Way:
    window = experiment.scale.window
    if name == "dual_chunk":
        attention = AttentionConfig(name="dual_chunk", window=window)
        overrides = ("attention=dual_chunk", f"attention.window={window}")
        return Way(experiment.model, attention, overrides)
    folder = experiment.output / "yarn_model"
    _write_yarn(experiment.model, folder, window, experiment.scale.long)
    return Way(folder, AttentionConfig(), ())


def _write_yarn(model: Path, folder: Path, window: int, long: int) -> None:
    """Writes a copy of a model whose config scales its rotary embedding by YaRN."""
    shutil.copytree(model, folder, dirs_exist_ok=True)
    config = json.loads((model / "config.json").read_text())
    config["max_position_embeddings"] = long
    config["rope_parameters"] |= {
        "rope_type": "yarn",
        "factor": long / window,
        "original_max_position_embeddings": window,
    }
    write_json(folder / "config.json", config)


def _held_out(
    experiment: Experiment, folder: str, model: Path, attention: AttentionConfig
) -> list[dict[str, Any]]:
    """Returns the loss of the same tokens of the held-out novel, at the window and at `long`."""
    scale = experiment.scale
    evaluation = experiment.evaluate(
        folder,
        experiment.held_out(),
        model,
        attention,
        tasks=["perplexity"],
        lengths=[scale.window, scale.long],
        window=scale.long,
        stride=scale.stride,
        min_context=scale.long - scale.stride + 1,
        document_tokens=document_tokens(scale.long, scale.stride, scale.held_out_strides),
    )
    return rows_of(evaluation, "perplexity")


def _train(experiment: Experiment, way: Way, folder: Path) -> None:
    files = [str(experiment.novel(name)) for name in NOVELS if name != HELD_OUT]
    run_training(
        [
            "model=hf",
            f"model.name_or_path={way.model}",
            "data=text",
            f"data.files={files}",
            f"data.held_out_files=[{experiment.novel(HELD_OUT)}]",
            f"data.max_document_tokens={experiment.scale.long}",
            f"data.cache_dir={experiment.output / 'cache'}",
            "optim.learning_rate=1e-4",
            "evaluation.enabled=false",
            "callbacks.checkpoint=null",
            *way.overrides,
            *experiment.scale.training,
            *experiment.overrides,
        ],
        folder,
    )


def _losses(path: Path) -> list[float]:
    with path.open() as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")]
