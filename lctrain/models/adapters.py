"""The transformers model inside PEFT's adapters, which is the one to patch."""

from __future__ import annotations

from typing import Any


def inside_adapters(model: Any) -> Any:
    """Returns the transformers model inside a PeftModel, with its adapters; others as they are.

    Args:
        model: Any module.

    Raises:
        ValueError: for prompt learning, which puts tokens or cached keys in front of a row.
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
    """Whether a PeftModel's active adapter is prompt tuning, p-tuning or prefix tuning."""
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))
