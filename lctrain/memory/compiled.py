"""Says which layers of a model torch.compile compiles: their activations are kept in other ways."""

from __future__ import annotations

from typing import Any

from torch import nn

from lctrain.compiled import is_compiled

REFUSED = (
    "memory must keep the input of every layer on the GPU, and nothing else, under "
    "torch.compile, got offload, segments, kept attention or backward_by_head. Use "
    "memory=checkpoint without these options, or do not compile."
)
"""Message for a policy that torch.compile cannot trace."""


def compiled_layers(model: nn.Module, layers: list[Any]) -> list[bool]:
    """Returns for each layer whether torch.compile compiles its attention.

    The attention's backward then overwrites no inputs.

    Args:
        model: A model, compiled or with compiled modules.
        layers: Layers of the model.
    """
    inside = {id(part) for m in model.modules() if is_compiled(m) for part in m.modules()}

    def has_compiled(layer: nn.Module) -> bool:
        names = ((id(part), type(part).__name__) for part in layer.modules())
        return any(key in inside and "Attention" in name for key, name in names)

    return [id(layer) in inside or has_compiled(layer) for layer in layers]


def is_compiled_around(model: nn.Module, layers: list[Any]) -> bool:
    """Returns whether torch.compile compiles the code that calls a model's layers.

    Args:
        model: A model, compiled or with compiled modules.
        layers: Layers of the model.
    """
    own = set(map(id, layers))
    return any(
        is_compiled(module) and any(id(part) in own - {id(module)} for part in module.modules())
        for module in model.modules()
    )
