"""Composes configurations of lctrain-train as the command does."""

from hydra import compose, initialize_config_module
from omegaconf import DictConfig

from lctrain.config import (
    TrainConfig,
    to_dataclass,
)
from lctrain.schemas import register_schemas


def composed(*overrides, output_dir="out") -> DictConfig:
    register_schemas()
    with initialize_config_module("lctrain.configs", version_base="1.3"):
        return compose("train", [f"paths.output_dir={output_dir}", *overrides])


def load(*overrides, **kwargs) -> TrainConfig:
    return to_dataclass(composed(*overrides, **kwargs), TrainConfig)
