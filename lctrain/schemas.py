"""Registers the schemas of `lctrain.config` and the sources of `lctrain.data` with Hydra."""

from __future__ import annotations

from dataclasses import dataclass, fields
from importlib import resources
from typing import Any

from omegaconf import OmegaConf

from lctrain import config
from lctrain.config import DataConfig, store_schema
from lctrain.data.hub import HubSource
from lctrain.data.packages import PackagesSource
from lctrain.data.sources import JsonlSource, ParquetSource, Source, StdlibSource, TextSource
from lctrain.run.new_folder import register_new_run_folder


@dataclass(frozen=True, kw_only=True)
class StdlibData(DataConfig, StdlibSource):
    """data=stdlib"""


@dataclass(frozen=True, kw_only=True)
class PackagesData(DataConfig, PackagesSource):
    """data=packages"""


@dataclass(frozen=True, kw_only=True)
class TextData(DataConfig, TextSource):
    """data=text"""


@dataclass(frozen=True, kw_only=True)
class JsonlData(DataConfig, JsonlSource):
    """data=jsonl"""


@dataclass(frozen=True, kw_only=True)
class ParquetData(DataConfig, ParquetSource):
    """data=parquet"""


@dataclass(frozen=True, kw_only=True)
class HubData(DataConfig, HubSource):
    """data=hub"""


def source_of(data: DataConfig) -> Source:
    """The source that a data config describes, without the rest.

    Raises:
        ValueError: if the config has none, or a value of the source does not fit.
    """
    for base in type(data).__mro__:
        if issubclass(base, Source) and not issubclass(base, DataConfig):
            return base(**{field.name: getattr(data, field.name) for field in fields(base)})
    raise ValueError(
        f"data must name a source, got {type(data).__name__}. Choose data=stdlib, packages, "
        "text, jsonl, parquet or hub."
    )


SCHEMAS: dict[str, Any] = {
    "data/stdlib": StdlibData,
    "data/packages": PackagesData,
    "data/text": TextData,
    "data/jsonl": JsonlData,
    "data/parquet": ParquetData,
    "data/hub": HubData,
    "model/scratch": config.ScratchModelConfig,
    "model/pretrained": config.PretrainedModelConfig,
    "attention/attention": config.AttentionConfig,
    "optim/adamw": config.OptimConfig,
    "trainer/trainer": config.TrainerConfig,
    "callbacks/checkpoint": config.CheckpointConfig,
    "callbacks/throughput": config.ThroughputConfig,
    "callbacks/isolation": config.IsolationConfig,
    "callbacks/non_finite": config.NonFiniteGuardConfig,
    "callbacks/length_perplexity": config.LengthPerplexityConfig,
    "callbacks/attention_schedule": config.AttentionScheduleConfig,
    "callbacks/best_checkpoint": config.BestCheckpointConfig,
    "callbacks/early_stopping": config.EarlyStoppingConfig,
    "callbacks/progress_bar": config.ProgressBarConfig,
    "logger/csv": config.CsvLoggerConfig,
    "logger/wandb": config.WandbLoggerConfig,
    "logger/tensorboard": config.TensorBoardLoggerConfig,
    "paths/paths": config.PathsConfig,
    "evaluation/evaluation": config.EvaluationConfig,
    "train": config.TrainConfig,
    "eval": config.EvalConfig,
}


def register_schemas() -> None:
    """Puts every schema, and the recipes, into Hydra's ConfigStore. Idempotent."""
    register_new_run_folder()
    for name, schema in SCHEMAS.items():
        store_schema(name, schema)
    register_recipes()


def register_recipes() -> None:
    """Makes `experiment=` find the recipes.

    The first line of a recipe is the command that runs it. In files that Hydra reads itself, the
    first line must be its package directive, so lctrain registers recipes by itself. Recipes in
    your own folders follow Hydra's rules: first line `# @package _global_`, and
    hydra.searchpath=[file:///my/recipes].
    """
    from hydra.core.config_store import ConfigStore

    for file in (resources.files("lctrain.recipes") / "experiment").iterdir():
        if file.name.endswith(".yaml"):
            ConfigStore.instance().store(
                group="experiment",
                name=file.name.removesuffix(".yaml"),
                node=OmegaConf.create(file.read_text()),
                package="_global_",
            )
