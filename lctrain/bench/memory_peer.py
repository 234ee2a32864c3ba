"""checkpoint_layers: the activation checkpointing of transformers, for peers of the benchmark."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

POLICIES = ("none", "checkpoint", "offload")  # of memory, which transformers has as well


def checkpoint_layers(model: Any, policy: str) -> None:
    """Applies a memory policy of transformers to a model.

    transformers has the option `offload` since version 5.23. For older versions this function
    composes the same two functions of torch.

    Args:
        model: A transformers model, without adapters around it.
        policy: "none", "checkpoint" (every layer), or "offload" (also moves the layers' inputs to
            pinned host memory).
    """
    if policy == "none":
        model._set_gradient_checkpointing(False)
        return
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(offload=policy == "offload")
        return

    def offloaded(layer: Any, *given: Any, **options: Any) -> Any:
        with torch.autograd.graph.save_on_cpu(pin_memory=True):
            return checkpoint(layer, *given, use_reentrant=False, **options)

    model.gradient_checkpointing_enable({"use_reentrant": False})
    if policy == "offload":
        model._set_gradient_checkpointing(True, offloaded)
