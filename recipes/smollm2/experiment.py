"""Defines the experiment: its folders, its texts, and one evaluation of a stored model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lctrain.config import AttentionConfig, PathsConfig, PretrainedModelConfig
from lctrain.eval.cells import CellStore
from lctrain.evaluate import EvalConfig, Evaluation, evaluate
from lctrain.limits import require
from lctrain.recipes.machine import machine
from lctrain.recipes.output import remove_stopped
from lctrain.recipes.smollm2.model import FILES
from lctrain.recipes.smollm2.novels import HELD_OUT, NOVELS
from lctrain.recipes.smollm2.scale import Scale
from lctrain.schemas import TextData
from lctrain_kernels.strict_json import write_json

FETCH = "python -m lctrain.recipes.smollm2.fetch"


@dataclass(frozen=True)
class Experiment:
    """Folders and sizes of the experiment.

    Attributes:
        material: Folder that the command `fetch` wrote.
        output: Folder for all files of the experiment.
        scale: Sizes of the whole experiment.
        overrides: Hydra overrides of the continued training.
    """

    material: Path
    output: Path
    scale: Scale
    overrides: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for needed in (*(self.model / name for name in FILES), *map(self.novel, NOVELS)):
            require(
                needed.is_file(),
                f"folder must hold model and novels, got {self.material} without {needed.name}. "
                f"Fetch them: {FETCH} {self.material}",
            )

    @property
    def model(self) -> Path:
        """Folder of the fetched model."""
        return self.material / "model"

    def novel(self, name: str) -> Path:
        """Returns the text file of a novel."""
        return self.material / "novels" / f"{name}.txt"

    def all_novels(self) -> TextData:
        """Returns all novels, tokenized for the model."""
        return self._texts(NOVELS)

    def held_out(self) -> TextData:
        """Returns the novel that is never trained on, tokenized for the model."""
        return self._texts((HELD_OUT,))

    def evaluate(
        self,
        folder: str,
        data: TextData,
        model: Path | None = None,
        attention: AttentionConfig | None = None,
        **settings: Any,
    ) -> Evaluation:
        """Runs `lctrain-eval` on a model. A stopped evaluation goes on after its last cell.

        Args:
            folder: Name of the evaluation's folder below that of the experiment.
            data: The texts.
            model: Folder of the model; None for the fetched one.
            attention: Attention of the model, which the methods replace.
            **settings: Further settings of EvalConfig.
        """
        path = self.output / folder
        if not self.has_begun(folder):
            remove_stopped(path)
        return evaluate(
            EvalConfig(
                model=PretrainedModelConfig(name_or_path=str(model or self.model)),
                data=data,
                attention=attention or AttentionConfig(),
                paths=PathsConfig(output_dir=str(path)),
                split="all",
                dtype="bfloat16" if torch.cuda.is_available() else "float32",
                resume=str(path) if self.has_begun(folder) else None,
                **settings,
            )
        )

    def has_begun(self, folder: str) -> bool:
        """Returns whether an evaluation has finished cells, with which it goes on."""
        return CellStore.has_cells(self.output / folder)

    def save(self, name: str, content: dict[str, Any], seconds: float, resumed: bool) -> Path:
        """Writes the record of a stage into the output folder.

        Args:
            name: Name of the stage.
            content: What was measured.
            seconds: Wall time of the stage in this process.
            resumed: Whether an earlier process ran a part of the stage; the record then has no
                time.
        """
        timed = None if resumed else round(seconds, 1)
        record = {"stage": name, **machine(), "seconds": timed, **content}
        self.output.mkdir(parents=True, exist_ok=True)
        path = self.output / f"{name}.json"
        write_json(path, record)
        return path

    def _texts(self, names: tuple[str, ...]) -> TextData:
        return TextData(
            files=tuple(str(self.novel(name)) for name in names),
            tokenizer=str(self.model),
            cache_dir=str(self.output / "cache"),
        )


def rows_of(evaluation: Evaluation, task: str) -> list[dict[str, Any]]:
    """Returns the rows that an evaluation wrote for a task."""
    content: dict[str, Any] = json.loads(evaluation.paths[f"{task} json"].read_text())
    rows: list[dict[str, Any]] = content["rows"]
    return rows
