"""with_remedies: lets an error of memory name a setting that would save memory and that applies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch

from lctrain.config import AdapterConfig, TrainConfig
from lctrain.config.memory import WITH_HOST
from lctrain.memory.layers import checkpointed_layers
from lctrain.memory.tiles import TiledMLPs
from lctrain.models.adapters import inside_adapters

_TILE = 4096  # tokens of an MLP's tile


@contextmanager
def with_remedies(config: TrainConfig, module: Any) -> Iterator[None]:
    """Context manager that gives a torch.OutOfMemoryError the attribute `remedy`.

    Args:
        config: Settings of the run.
        module: LightningModule of the run, whose `model` is the trained model.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        error.remedy = None  # type: ignore[attr-defined]
        with suppress(Exception):  # which would replace the error of memory
            error.remedy = find_remedy(config, module.model)  # type: ignore[attr-defined]
        raise


def find_remedy(config: TrainConfig, model: Any) -> str | None:
    """Returns the setting that saves most memory, of those that a run does not have yet.

    A setting that lctrain would refuse for the run or for its model is left out.

    Args:
        config: Settings of the run.
        model: The trained model, or a PeftModel around it.

    Returns:
        A part of a sentence; None if no setting is left.
    """
    inner = inside_adapters(model)
    layers = []
    if getattr(inner, "supports_gradient_checkpointing", False):
        layers = checkpointed_layers(inner)
    memory = config.memory
    if layers and memory.name not in WITH_HOST:
        return "Set memory=auto"
    tiles = {"memory": {"mlp_tokens": _TILE}}
    is_long = config.data.max_tokens > _TILE
    if layers and is_long and memory.mlp_tokens is None and _is_valid(config, tiles):
        try:
            TiledMLPs(layers, _TILE).remove()
            return f"Set memory.mlp_tokens={_TILE}"
        except ValueError:  # no dense MLP, or weights whose gradients are not float32
            pass
    if config.adapter is None and _is_valid(config, {"adapter": AdapterConfig()}):
        return "Train adapters (adapter=lora)"
    if memory.name == "auto":
        return "Set memory.device_gib below the GPU's memory, so that memory=auto keeps less on it"
    return None


def _is_valid(config: TrainConfig, changes: dict[str, Any]) -> bool:
    """Returns whether lctrain accepts a run's settings with changes.

    Args:
        config: Settings of the run.
        changes: New values by the name of the setting; a dict changes the settings of a group.
    """
    try:
        parts = {
            name: replace(getattr(config, name), **value) if isinstance(value, dict) else value
            for name, value in changes.items()
        }
        replace(config, **parts)
    except ValueError:
        return False
    return True
