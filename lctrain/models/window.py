"""configured_window: the trained window (length of the training texts) that a config states.

cache_window: the keys that layers with windows keep in a cache.
"""

from typing import Any


def configured_window(config: Any) -> int | None:
    """Returns the trained window that a model's config states, in tokens; None if it states none.

    The window is `original_max_position_embeddings` of the config's `dual_chunk_attention_config`,
    if there is one: in Qwen2.5-1M, `max_position_embeddings` is the longer length that dual chunk
    attention reaches. Otherwise the window is `max_position_embeddings`. If RoPE is scaled (YaRN,
    for example), that is the length for which the scaled model was trained.

    Args:
        config: A transformers configuration.
    """
    published = getattr(config, "dual_chunk_attention_config", None) or {}
    window = published.get("original_max_position_embeddings")
    return window or getattr(config, "max_position_embeddings", None)


def cache_window(config: Any) -> int | None:
    """Returns the number of keys that layers with windows keep in a cache; None without windows.

    Args:
        config: A transformers configuration.
    """
    text = config.get_text_config(decoder=True)
    window = getattr(text, "sliding_window", None)
    return window or getattr(text, "attention_chunk_size", None)
