"""require_flash_attention: refuses documents that share a prefix for a model that ignores this."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lctrain.batch import PackedBatch
from lctrain.instances import require_instance


def require_flash_attention(model: nn.Module, arguments: Mapping[str, Any]) -> None:
    """Raises a ValueError if a model ignores the shared prefixes in its arguments.

    A model of transformers without a patch takes any keyword argument. Only the first completion of
    a group would then see the prompt. A model without a config is not checked.

    Args:
        model: A transformers model, or a PeftModel around one.
        arguments: Keyword arguments of the model, as `PackedBatch.model_kwargs()` returns them.

    Raises:
        ValueError: if there are shared prefixes, and the attention of the model is not flash.
    """
    config = getattr(model, "config", None)
    if arguments.get("prefix_groups") is None or config is None:
        return
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    attention = str(getattr(text, "_attn_implementation", None))
    if attention != "lctrain_flash":
        raise ValueError(
            "the attention of shared prefixes must be flash, got "
            f"{attention.removeprefix('lctrain_')}. Patch the model with attention='flash', a "
            "reference model too, or pass prompts and completions as separate documents: "
            "PackedBatch.from_documents."
        )


def require_batch(model: Any, batch: Any) -> None:
    """Raises a TypeError unless a loss gets a model and a pack."""
    require_instance("model", model, nn.Module, "Pass a model of transformers.")
    remedy = "Build one with lctrain.PackedBatch.from_documents."
    require_instance("batch", batch, PackedBatch, remedy)
