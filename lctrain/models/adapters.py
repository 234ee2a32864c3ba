"""Finds the transformers model inside a PeftModel; patches apply to that inner model."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

from torch import nn


def inside_adapters(model: Any) -> Any:
    """Returns the transformers model inside a PeftModel, adapters included.

    Args:
        model: A PeftModel, or any other module, which is returned unchanged.

    Raises:
        ValueError: if the PeftModel uses prompt learning, which puts virtual tokens or cached keys
            in front of a row.
    """
    base = getattr(model, "get_base_model", None)
    if base is None:
        return model
    if has_virtual_tokens(model):
        raise ValueError(
            f"model must have adapters inside its layers, got {type(model).__name__} with "
            f"{model.active_peft_config.peft_type.value}, whose virtual tokens stand in front of a "
            "row, where a pack has no document. Train LoRA on packs."
        )
    return base()


def has_virtual_tokens(model: Any) -> bool:
    """Returns whether a model is a PeftModel with prompt tuning, p-tuning or prefix tuning."""
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))


def trained_beside_adapters(model: Any) -> list[str]:
    """Returns the names of trainable parameters that act while a PeftModel's adapters are off.

    Examples are the biases that LoRA's `bias="all"` trains, and weights that a caller unfreezes.

    Args:
        model: A PeftModel.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    switched: set[int] = set()
    for module in model.modules():
        parts: list[Any] = []
        if isinstance(module, BaseTunerLayer):
            parts = [getattr(module, name, None) for name in module.adapter_layer_names]
        elif isinstance(module, AuxiliaryTrainingWrapper):
            parts = [part for name, part in module.named_children() if name != "original_module"]
        for part in parts:
            if isinstance(part, nn.Module):
                switched.update(id(parameter) for parameter in part.parameters())
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in switched
    ]


def refuse_virtual_tokens() -> None:
    """Refuses a pack of embeddings that comes from a PeftModel with virtual tokens.

    Such a PeftModel puts virtual tokens before the embeddings and the mask, so only the first
    document of a pack would have them. The inner model cannot see this in its arguments. So this
    function searches the call stack for the PeftModel.

    Raises:
        ValueError: if a function on the call stack belongs to a PeftModel with virtual tokens.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if caller is not None and has_virtual_tokens(caller):
            raise ValueError(
                f"A row must hold one document, got several with "
                f"{caller.active_peft_config.peft_type.value}, whose virtual tokens would stand in "
                "front of the first document only. Pass one document per row, or train LoRA."
            )
        frame = frame.f_back
