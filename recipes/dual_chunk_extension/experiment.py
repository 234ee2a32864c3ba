"""Defines the experiment: its folders, sizes, and the configuration of the first training run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lctrain.config import DataConfig, TrainConfig, to_dataclass
from lctrain.recipes.dual_chunk_extension.scale import Scale
from lctrain.report import RunReport
from lctrain.schemas import register_schemas
from lctrain.train import quiet_lightning, train
from lctrain_kernels.strict_json import write_json


@dataclass(frozen=True)
class Experiment:
    """Folder, sizes and overrides of the experiment.

    Attributes:
        output: Folder for all files of the experiment.
        scale: Sizes of the whole experiment.
        overrides: Hydra overrides of the first training run.
    """

    output: Path
    scale: Scale
    overrides: tuple[str, ...] = ()

    @property
    def model(self) -> Path:
        """Folder of the model trained on the short window, in bfloat16."""
        return self.output / "model"

    def short_training(self) -> list[str]:
        """Overrides of the first training run."""
        return ["experiment=dual_chunk_extension", *self.scale.train, *self.overrides]

    def data(self) -> DataConfig:
        """Returns the training's documents, tokenized for the trained model."""
        if not self.model.is_dir():
            raise ValueError(
                f"output must hold the trained model, got {self.output} without the folder "
                "`model`. Run the stage train first, or copy that folder there."
            )
        config = compose_training(self.short_training(), self.output / "train")
        return replace(config.data, tokenizer=str(self.model))

    def save(self, name: str, content: Any) -> Path:
        """Writes a JSON file into the output folder."""
        self.output.mkdir(parents=True, exist_ok=True)
        path = self.output / f"{name}.json"
        write_json(path, content)
        return path


def run_training(overrides: Sequence[str], folder: Path) -> RunReport:
    """Trains in this process, as `lctrain-train <overrides>` does."""
    quiet_lightning()
    return train(compose_training(overrides, folder))


def compose_training(overrides: Sequence[str], folder: Path) -> TrainConfig:
    """Returns the configuration of `lctrain-train <overrides>`, which writes into `folder`."""
    from hydra import compose, initialize_config_module

    register_schemas()
    with initialize_config_module("lctrain.configs", version_base="1.3"):
        config = compose("train", [f"paths.output_dir={folder}", *overrides])
    return to_dataclass(config, TrainConfig)
