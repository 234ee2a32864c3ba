"""Defines the experiment that all stages use: its folders, sizes and runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lctrain.config import TrainConfig
from lctrain.recipes.differential.scale import Scale
from lctrain.recipes.differential.variant import VARIANTS, Variant
from lctrain.recipes.dual_chunk_extension.experiment import compose_training
from lctrain_kernels import strict_json


@dataclass(frozen=True)
class Experiment:
    """Folder, sizes, variants and overrides of the experiment.

    Attributes:
        output: Folder for all files of the experiment.
        scale: Sizes of the whole experiment.
        variants: Names of the models to train.
        seeds: Seeds; each model is trained once with each seed.
        share: (i, n): this process trains only every n-th run, starting with run i, so that n
            processes train all runs.
        keep_models: Whether the trained models stay on the disk.
        overrides: Hydra overrides of every training run.
    """

    output: Path
    scale: Scale
    variants: tuple[str, ...] = tuple(VARIANTS)
    seeds: tuple[int, ...] = (0, 1, 2)
    share: tuple[int, int] = (0, 1)
    keep_models: bool = False
    overrides: tuple[str, ...] = ()

    @property
    def runs(self) -> list[tuple[Variant, int]]:
        """All (variant, seed) pairs of the experiment, seed by seed."""
        return [(VARIANTS[name], seed) for seed in self.seeds for name in self.variants]

    @property
    def shared_runs(self) -> list[tuple[Variant, int]]:
        """The runs that this process trains."""
        first, step = self.share
        return self.runs[first::step]

    def folder(self, variant: Variant, seed: int) -> Path:
        """Returns the folder of a run."""
        return self.output / "runs" / f"{variant.name}_{seed}"

    def record(self, variant: Variant, seed: int) -> Path:
        """Returns the path of the JSON file with the measurements of a run."""
        return self.folder(variant, seed).with_suffix(".json")

    def compose(self, variant: Variant, seed: int) -> TrainConfig:
        """Returns the training configuration of a run."""
        overrides = [
            "experiment=differential",
            *variant.overrides,
            *self.scale.train,
            *self.scale.of_variant.get(variant.name, ()),
            f"seed={seed}",
            *self.overrides,
        ]
        return compose_training(overrides, self.folder(variant, seed))

    def save(self, name: str, content: Any) -> Path:
        """Writes a JSON file into the output folder."""
        return write_json(self.output / f"{name}.json", content)


def trained_window(config: TrainConfig) -> int:
    """Returns the number of tokens of the longest document in training."""
    return config.data.max_document_tokens or config.data.max_tokens


def write_json(path: Path, content: Any) -> Path:
    """Writes a JSON file, and creates the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    strict_json.write_json(path, content)
    return path
