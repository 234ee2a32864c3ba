"""The stages of the experiment: each reads the model that the first one left, and writes files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lctrain.config import TrainConfig, to_dataclass
from lctrain.recipes.dual_chunk_extension.scale import Scale
from lctrain.report import RunReport
from lctrain.schemas import register_schemas
from lctrain.train import quiet_lightning, train

SHARD = "14MB"


@dataclass(frozen=True)
class Experiment:
    """Where it is, how large, and what the user changes.

    Attributes:
        output: Folder of everything that it writes.
        scale: Sizes of the whole experiment.
        overrides: Hydra overrides of both training runs.
    """

    output: Path
    scale: Scale
    overrides: tuple[str, ...] = ()

    @property
    def model(self) -> Path:
        """Folder of the model trained on the short window, in half precision."""
        return self.output / "model"

    def save(self, name: str, content: Any) -> Path:
        """Writes a JSON file into the output folder."""
        self.output.mkdir(parents=True, exist_ok=True)
        path = self.output / f"{name}.json"
        path.write_text(json.dumps(content, indent=2) + "\n")
        return path


def train_short(experiment: Experiment) -> RunReport:
    """Stage 1: trains on the short window, and stores the model in half precision."""
    folder = experiment.output / "train"
    report = run_training(
        ["experiment=dual_chunk_extension", *experiment.scale.train, *experiment.overrides], folder
    )
    store_half(folder / "model", experiment.model)
    experiment.save(
        "train",
        {
            "steps": report.steps,
            "training_loss": [report.first_loss, report.last_loss],
            "held_out_loss": [report.held_out_first, report.held_out_last],
            "tokens_per_second": report.tokens_per_second,
            "packing": report.packing,
            "perplexities": dict(report.perplexities),
        },
    )
    return report


def run_training(overrides: Sequence[str], folder: Path) -> RunReport:
    """Trains as `lctrain-train <overrides>` does, in this process."""
    quiet_lightning()
    return train(compose_training(overrides, folder))


def compose_training(overrides: Sequence[str], folder: Path) -> TrainConfig:
    """The configuration of `lctrain-train <overrides>`, writing into `folder`."""
    from hydra import compose, initialize_config_module

    register_schemas()
    with initialize_config_module("lctrain.configs", version_base="1.3"):
        config = compose("train", [f"paths.output_dir={folder}", *overrides])
    return to_dataclass(config, TrainConfig)


def store_half(source: Path, target: Path) -> None:
    """Copies a model in bfloat16, with its tokenizer, in files of at most 14 MB."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(target, max_shard_size=SHARD)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)
