"""Defines the experiment: its folders, its sizes, and the configuration of every run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lctrain.build import build_datamodule
from lctrain.composition import compose
from lctrain.config import TrainConfig, to_dataclass
from lctrain.data import PackedDataModule
from lctrain.eval.shipped import passkey_folder
from lctrain.limits import require
from lctrain.recipes.post_training.conversations import FILE, TEMPLATE
from lctrain.recipes.post_training.scale import Scale
from lctrain_kernels.strict_json import write_json


@dataclass(frozen=True)
class Experiment:
    """Folder, sizes, seeds and overrides of the experiment.

    Attributes:
        output: Folder for all files of the experiment.
        scale: Sizes of the whole experiment.
        seeds: Seeds of the runs of DPO and GRPO.
        overrides: Hydra overrides of every run.
    """

    output: Path
    scale: Scale
    seeds: tuple[int, ...]
    overrides: tuple[str, ...] = ()

    def compose(self, stage: str, seed: int) -> TrainConfig:
        """Returns the configuration of a run: `lctrain-train experiment=post_training_<stage>`.

        Args:
            stage: "sft", "dpo" or "grpo".
            seed: Seed of the run.

        Raises:
            ValueError: if an override is not valid, or the stage does not serve it.
        """
        paths = [f"model.name_or_path={passkey_folder('shipped')}"]
        if stage == "sft":
            paths += [f"data.files=[{FILE}]", f"data.chat_template={TEMPLATE}"]
        overrides = [
            f"experiment=post_training_{stage}",
            f"paths.output_dir={self.folder(stage, seed)}",
            f"seed={seed}",
            "trainer.enable_progress_bar=false",
            *paths,
            *getattr(self.scale, stage),
            *self.overrides,
        ]
        config = to_dataclass(compose("train", overrides), TrainConfig)
        return config if stage == "sft" else _served(config)

    def folder(self, stage: str, seed: int) -> Path:
        """Returns the folder of a run."""
        return self.output / f"{stage}_{seed}"

    def save(self, name: str, content: Any) -> Path:
        """Writes a JSON file into the output folder."""
        self.output.mkdir(parents=True, exist_ok=True)
        path = self.output / f"{name}.json"
        write_json(path, content)
        return path


def _served(config: TrainConfig) -> TrainConfig:
    """Returns the configuration of DPO or GRPO, without fused modules.

    Sampling and training then run the same modules.

    Args:
        config: Configuration of a run.

    Raises:
        ValueError: for a setting of lctrain-train that DPO and GRPO here would ignore.
    """
    attention = "none" if config.attention is None else config.attention.name
    trainer = config.trainer
    require(
        attention == "flash",
        f"attention must be flash, which serves shared prompts, got {attention}. Leave it out.",
    )
    require(
        trainer.devices_per_machine() == 1 and trainer.num_nodes == 1,
        f"trainer.devices and trainer.num_nodes must be 1 in this recipe, got {trainer.devices} "
        f"and {trainer.num_nodes}. Leave them out.",
    )
    require(
        trainer.strategy in ("auto", "single_device"),
        f"trainer.strategy must be auto or single_device in this recipe, got {trainer.strategy}: "
        "one device divides nothing. Leave it out.",
    )
    require(
        trainer.max_steps >= 1,
        f"trainer.max_steps must be at least 1 in this recipe, got {trainer.max_steps}. Questions "
        "are made for so many steps.",
    )
    ignored = {
        "trainer.budget_s": (trainer.budget_s, None),
        "ckpt_path": (config.ckpt_path, None),
        "evaluation.enabled": (config.evaluation.enabled, False),
        "task": (config.task, "causal"),
        "show": (config.show, 0),
    }
    for name, (value, served) in ignored.items():
        expected = "null" if served is None else str(served).lower()
        require(
            value == served,
            f"{name} must be {expected} with DPO and GRPO here, got {value}. Leave it out.",
        )
    assert config.attention is not None
    return replace(config, attention=replace(config.attention, fused=False))


def read_texts(config: TrainConfig) -> tuple[PackedDataModule, list[np.ndarray], list[np.ndarray]]:
    """Returns the data module of a run, and the token ids of its training and held-out documents.

    Args:
        config: Configuration of the run.
    """
    datamodule = build_datamodule(config.data, config.model)
    datamodule.prepare_data()
    datamodule.setup()
    held_out = [document.input_ids for document in datamodule.held_out_documents()]
    return datamodule, _training_documents(datamodule), held_out


def _training_documents(datamodule: PackedDataModule) -> list[np.ndarray]:
    """Returns the documents of the training rows, pieces of long ones on their own."""
    found: list[np.ndarray] = []
    loader = datamodule.train_dataloader()
    for _, batch in zip(range(len(loader)), loader, strict=False):
        tokens = batch.input_ids[0].numpy()
        found += np.split(tokens, np.cumsum(batch.lengths)[:-1])
    return found
