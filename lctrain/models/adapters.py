"""Finds the transformers model inside a PeftModel, which is the model to patch."""

from __future__ import annotations

from typing import Any


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
