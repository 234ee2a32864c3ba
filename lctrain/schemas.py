"""Registers the schemas of `lctrain.config` and the sources of `lctrain.data` with Hydra."""

from __future__ import annotations

from dataclasses import dataclass, fields
from importlib import resources
from typing import Any

from omegaconf import OmegaConf

from lctrain import config
from lctrain.config import DataConfig, store_schema
from lctrain.data.chat import ChatSource
from lctrain.data.hub import HubSource
from lctrain.data.mix import SourceMix
from lctrain.data.packages import PackagesSource
from lctrain.data.sources import JsonlSource, ParquetSource, Source, StdlibSource, TextSource
from lctrain.run.new_folder import register_new_run_folder


@dataclass(frozen=True, kw_only=True)
class StdlibData(DataConfig, StdlibSource):
    """Settings of data=stdlib: the Python files of the standard library."""


@dataclass(frozen=True, kw_only=True)
class PackagesData(DataConfig, PackagesSource):
    """Settings of data=packages: the Python files of the installed packages."""


@dataclass(frozen=True, kw_only=True)
class TextData(DataConfig, TextSource):
    """Settings of data=text: text files, one document each."""


@dataclass(frozen=True, kw_only=True)
class JsonlData(DataConfig, JsonlSource):
    """Settings of data=jsonl: JSON lines, one document each."""


@dataclass(frozen=True, kw_only=True)
class ParquetData(DataConfig, ParquetSource):
    """Settings of data=parquet: Parquet files, one document in each row."""


@dataclass(frozen=True, kw_only=True)
class HubData(DataConfig, HubSource):
    """Settings of data=hub: a dataset of the Hugging Face hub."""


@dataclass(frozen=True, kw_only=True)
class ChatData(DataConfig, ChatSource):
    """Settings of data=chat: conversations in JSON lines, Parquet files or a hub dataset."""


@dataclass(frozen=True, kw_only=True)
class MixData(DataConfig, SourceMix):
    """Settings of data=mix: several sources, each with a weight, epochs and limits."""


def source_of(data: DataConfig) -> Source | SourceMix:
    """Returns the source of documents, or the mix of sources, that the settings describe.

    Raises:
        ValueError: if the settings have no source, or a setting of the source is out of range.
    """
    for base in type(data).__mro__:
        if issubclass(base, (Source, SourceMix)) and not issubclass(base, DataConfig):
            return base(**{field.name: getattr(data, field.name) for field in fields(base)})
    raise ValueError(
        f"data must name a source, got {type(data).__name__}. Choose data=stdlib, packages, "
        "text, jsonl, parquet, hub, chat or mix."
    )


SCHEMAS: dict[str, Any] = {
    "data/stdlib": StdlibData,
    "data/packages": PackagesData,
    "data/text": TextData,
    "data/jsonl": JsonlData,
    "data/parquet": ParquetData,
    "data/hub": HubData,
    "data/chat": ChatData,
    "data/mix": MixData,
    "model/scratch": config.ScratchModelConfig,
    "model/pretrained": config.PretrainedModelConfig,
    "adapter/adapter": config.AdapterConfig,
    "attention/attention": config.AttentionConfig,
    "memory/memory": config.MemoryConfig,
    "optim/adamw": config.OptimConfig,
    "trainer/trainer": config.TrainerConfig,
    "callbacks/checkpoint": config.CheckpointConfig,
    "callbacks/throughput": config.ThroughputConfig,
    "callbacks/isolation": config.IsolationConfig,
    "callbacks/non_finite": config.NonFiniteGuardConfig,
    "callbacks/length_perplexity": config.LengthPerplexityConfig,
    "callbacks/long_context_eval": config.LongContextEvalConfig,
    "callbacks/attention_schedule": config.AttentionScheduleConfig,
    "callbacks/length_schedule": config.LengthScheduleConfig,
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
    """Registers all schemas and recipes in Hydra's ConfigStore, unless it holds them already."""
    from hydra.core.config_store import ConfigStore

    register_new_run_folder()
    last, schema = list(SCHEMAS.items())[-1]
    stored = ConfigStore.instance().repo.get(f"{last}_schema.yaml")
    if stored is not None and OmegaConf.get_type(stored.node) is schema:
        return  # storing them takes longer than composing a configuration
    register_recipes()
    for name, schema in SCHEMAS.items():
        store_schema(name, schema)


def register_recipes() -> None:
    """Registers lctrain's recipes in Hydra's ConfigStore as choices of the group `experiment`.

    Hydra would require the package directive `# @package _global_` in the first line of a recipe's
    file, where lctrain's recipes have the command that runs them. Recipes in your own folders need
    the directive, and the option hydra.searchpath=[file:///my/recipes].
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
