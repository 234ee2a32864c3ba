"""divided: what a planned training step takes on each rank if FSDP2 shards the model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor

from lctrain.memory.layers import checkpointed_layers
from lctrain.memory.profile import Profile

GATHERED = 2
"""Layers whose parameters are whole at the same time: the one that runs, and the next one."""
_REDUCED_BYTES = 4  # gradients are summed over ranks in float32


def divided(measured: Profile, model: Any, precision: str, shards: int) -> Profile:
    """Returns the bytes of a training step on one rank whose parameters FSDP2 shards.

    A rank holds its share of weights, gradients and optimizer states. For two layers at a time, and
    for the parameters outside of the layers, it also holds the whole weights, and in the backward
    their whole gradients.

    Args:
        measured: Bytes of the step without sharding, from `profile`.
        model: A transformers causal LM, or a PeftModel around one, before it is sharded.
        precision: "true" if whole weights have the dtype of their shards, or "bf16-mixed".
        shards: Number of ranks among which one copy of the parameters is divided.
    """
    size = 2 if precision == "bf16-mixed" else None
    layers = [list(layer.parameters()) for layer in checkpointed_layers(model)]
    inside = {id(parameter) for layer in layers for parameter in layer}
    outside = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    weights = _bytes(outside, size) + GATHERED * max(_bytes(layer, size) for layer in layers)
    trained = [[p for p in part if p.requires_grad] for part in (outside, *layers)]
    sums = [_bytes(part, size) + _bytes(part, _REDUCED_BYTES) for part in trained]
    gradients = sums[0] + GATHERED * max(sums[1:])
    return replace(
        measured,
        weights=-(-measured.weights // shards) + weights,
        gradients=-(-measured.gradients // shards) + gradients,
        accumulates=True,  # the shares of gradients are small, so they count throughout the step
        optimizer=-(-measured.optimizer // shards),
        head_dim=0,  # the time of the collectives is unknown
    )


def _bytes(parameters: Iterable[Tensor], size: int | None) -> int:
    """Returns the bytes of parameters with elements of `size` bytes, None for their own size."""
    return sum(p.numel() * (p.element_size() if size is None else size) for p in parameters)
