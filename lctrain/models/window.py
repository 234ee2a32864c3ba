"""configured_window: the trained window (length of the training texts) that a config states.

cache_window: the keys that layers with windows keep in a cache.
refuse_cut_keys: refuses a cache that forgets keys to which the layers attend.
"""

from typing import Any

from torch import nn

from lctrain.models.architectures import has_windows


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


def refuse_cut_keys(model: nn.Module) -> None:
    """Raises a ValueError if transformers' caches of a model forget keys that its layers attend to.

    Without `layer_types` in a config, transformers makes caches with windows if the config states
    one, also for models whose layers know no windows, such as Llama and DiffLlama.

    Args:
        model: A model of transformers.
    """
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    for name in ("sliding_window", "attention_chunk_size"):
        window = getattr(text, name, None)
        if window is None or getattr(text, "layer_types", None) is not None or has_windows(model):
            continue
        raise ValueError(
            f"{name} must be None in the config of {type(model).__name__}, got {window}: its "
            f"layers attend to all keys, but the key/value cache would keep {window} of them. Set "
            f"model.config.{name} = None before you generate."
        )
