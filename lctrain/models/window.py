"""The trained window of a model: on how many tokens at a time it was trained."""

from typing import Any


def configured_window(config: Any) -> int | None:
    """Returns the window that a model's config states, None if it states none.

    It is, in this order: `original_max_position_embeddings` of `dual_chunk_attention_config`
    (vLLM's name, found in Qwen2.5-1M, whose `max_position_embeddings` is what that attention
    reaches); `max_position_embeddings`, also where rotary embeddings are scaled: it is what the
    model as configured was trained for.

    Args:
        config: A transformers configuration.
    """
    published = getattr(config, "dual_chunk_attention_config", None) or {}
    window = published.get("original_max_position_embeddings")
    return window or getattr(config, "max_position_embeddings", None)
