"""The trained window of a model: on how many tokens at a time it was trained."""

from typing import Any


def configured_window(config: Any) -> int | None:
    """Returns the window that a model's config states, or None.

    `original_max_position_embeddings` of `dual_chunk_attention_config` comes first. (In Qwen2.5-1M
    it is the trained window, while `max_position_embeddings` is the length that dual chunk
    attention reaches.) Otherwise the window is `max_position_embeddings`, also with scaled RoPE,
    since the scaled model was trained for it.

    Args:
        config: A transformers configuration.
    """
    published = getattr(config, "dual_chunk_attention_config", None) or {}
    window = published.get("original_max_position_embeddings")
    return window or getattr(config, "max_position_embeddings", None)
