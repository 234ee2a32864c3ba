"""Stages 1 to 3: trains on the short window, then measures perplexity and passkeys beyond it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lctrain.config import AttentionConfig, PathsConfig, PretrainedModelConfig
from lctrain.eval import METHODS
from lctrain.eval.cells import CellStore
from lctrain.evaluate import EvalConfig, PasskeyConfig, evaluate
from lctrain.recipes.dual_chunk_extension.experiment import (
    Experiment,
    compose_training,
    run_training,
)
from lctrain.recipes.machine import machine
from lctrain.recipes.output import remove_stopped

SHARD = "14MB"


def train_short(experiment: Experiment) -> None:
    """Trains on the short window, and stores the model in bfloat16."""
    overrides, folder = experiment.short_training(), experiment.output / "train"
    accelerator = compose_training(overrides, folder).trainer.accelerator
    report = run_training(overrides, folder)
    store_half(experiment.output / "train" / "model", experiment.model)
    experiment.save(
        "train",
        {
            **machine(accelerator),
            "steps": report.steps,
            "training_loss": [report.first_loss, report.last_loss],
            "held_out_loss": [report.held_out_first, report.held_out_last],
            "tokens_per_second": report.tokens_per_second,
            "packing": report.packing,
            "perplexities": dict(report.perplexities),
        },
    )


def measure_perplexity(experiment: Experiment) -> None:
    """Measures the perplexity of long held-out documents at 1 to 16 windows, by every method."""
    print(run_evaluation(experiment, "perplexity"), flush=True)


def find_passkeys(experiment: Experiment) -> None:
    """Measures the share of passkeys found at 1 to 16 windows, by every method."""
    print(run_evaluation(experiment, "passkey"), flush=True)


def run_evaluation(experiment: Experiment, task: str) -> Any:
    """Runs a task of `lctrain-eval` on the trained model, in a folder with the task's name.

    An evaluation that was stopped goes on after its last cell.
    """
    scale, path = experiment.scale, experiment.output / task
    has_begun = CellStore.has_cells(path)
    if not has_begun:
        remove_stopped(path)
    return evaluate(
        EvalConfig(
            model=PretrainedModelConfig(name_or_path=str(experiment.model)),
            data=experiment.data(),
            attention=AttentionConfig(),
            paths=PathsConfig(output_dir=str(path)),
            resume=str(path) if has_begun else None,
            tasks=[task],
            methods=list(METHODS),
            window=scale.window,
            documents=scale.documents,
            document_tokens=scale.document_tokens,
            lengths=scale.lengths,
            max_tokens=max(scale.max_tokens, scale.lengths[-1]),
            stride=scale.stride,
            passkey=PasskeyConfig(depths=list(scale.depths), keys_per_cell=scale.keys_per_cell),
        )
    )


def store_half(source: Path, target: Path) -> None:
    """Saves a model in bfloat16 with its tokenizer, in files of at most 14 MB."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(target, max_shard_size=SHARD)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)
