"""Adapters of a model that FSDP2 shards: their part of a checkpoint, and merging them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from lctrain.distributed.sharding import local_part, whole_value
from lctrain.models.low_rank import adapter_state, has_reloaded_base


def checkpoint_weights(model: Any, prefix: str) -> dict[str, Tensor] | None:
    """Returns the trained tensors of adapters by their names in a checkpoint.

    The tensors share their memory with the model's parameters. None stands for a model whose
    checkpoints hold all of its weights.

    Args:
        model: A model, which FSDP2 may have sharded.
        prefix: Text before the names in the checkpoint.
    """
    if not has_reloaded_base(model):
        return None
    return {f"{prefix}{name}": tensor for name, tensor in adapter_state(model).items()}


def merge_shards(model: Any) -> nn.Module:
    """Adds the adapters of a sharded PeftModel to its weights, and returns the model without them.

    peft merges one layer at a time, on whole weights in their own dtype, so the result has the bits
    of a model that is not sharded. All ranks must call this function.

    Args:
        model: A PeftModel whose parameters are DTensors. It is changed in place.
    """
    for layer in [module for module in model.modules() if hasattr(module, "merged_adapters")]:
        with _whole_parameters(layer):
            layer.merge(safe_merge=True)
    merged: nn.Module = model.unload()
    return merged


@contextmanager
def _whole_parameters(layer: nn.Module) -> Iterator[None]:
    """Context manager in which a layer has whole parameters; its shards get their changes."""
    kept = [
        (module, name, parameter)
        for module in layer.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]
    try:
        for module, name, parameter in kept:
            module._parameters[name] = nn.Parameter(
                whole_value(parameter.data), parameter.requires_grad
            )
        yield
        for module, name, parameter in kept:
            _copy_shard(parameter.data, module._parameters[name])
    finally:
        for module, name, parameter in kept:
            module._parameters[name] = parameter


@torch.no_grad()
def _copy_shard(shards: Tensor, whole: Any) -> None:
    """Copies this rank's part of a whole tensor into its shard."""
    if isinstance(shards, DTensor):
        divided = distribute_tensor(
            whole.data, shards.device_mesh, shards.placements, src_data_rank=None
        )
        local_part(shards).copy_(divided.to_local())
    else:
        shards.copy_(whole.data)
