"""Finds and checks the key/value cache among a call's arguments; its name depends on the model."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lctrain.attention.cached import is_cached_rows
from lctrain.pluralize import pluralize

CACHE_ARGUMENTS = ("cache", "past_key_values")
"""Names of the cache. From 5.24 on, transformers takes both; before, `past_key_values` only."""


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """Returns the key/value cache among a call's arguments; None if there is none.

    Args:
        arguments: Keyword arguments of a model or a layer.
    """
    for name in CACHE_ARGUMENTS:
        if arguments.get(name) is not None:
            return arguments[name]
    return None


def without_cache(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a call's arguments without the key/value cache.

    Args:
        arguments: Keyword arguments of a model or a layer.
    """
    return {name: value for name, value in arguments.items() if name not in CACHE_ARGUMENTS}


def given_rows(arguments: Mapping[str, Any]) -> Tensor | None:
    """Returns the result of cached_rows among a model's masks; None if there is none.

    transformers makes it before the model is called, for a cache of fixed size.

    Args:
        arguments: Keyword arguments of a model. Its mask may be a dict with one mask per kind of
            layer.
    """
    mask = arguments.get("attention_mask")
    masks = mask.values() if isinstance(mask, dict) else (mask,)
    rows = (mask for mask in masks if isinstance(mask, Tensor) and is_cached_rows(mask))
    return next(rows, None)


def refuse_full(arguments: Mapping[str, Any], rows: int, tokens: int) -> None:
    """Raises a ValueError if a cache of fixed size has windows, or no room for a call's tokens.

    A call with one token per row is checked on a CPU only: reading the length of the cache from a
    GPU would synchronise.

    Args:
        arguments: Keyword arguments of a model.
        rows: Rows B of the call.
        tokens: Tokens S per row of the call.
    """
    layers = getattr(given_cache(arguments), "layers", ())
    layer = next((x for x in layers if isinstance(getattr(x, "max_cache_len", None), int)), None)
    if layer is None or torch.compiler.is_compiling():
        return
    if any(getattr(x, "is_sliding", False) for x in layers):
        raise ValueError(
            "a key/value cache of fixed size must hold all keys of a row in every layer, got a "
            "StaticCache with sliding windows. Use a DynamicCache."
        )
    keys = layer.keys if layer.is_initialized else None
    if keys is not None and keys.shape[0] != rows:
        raise ValueError(
            f"the key/value cache must have a row per row of the input ({rows}), got a StaticCache "
            f"with {pluralize(keys.shape[0], 'row')}. Make a new cache for each batch."
        )
    if keys is not None and keys.device.type != "cpu" and tokens == 1:
        return
    stored = int(layer.get_seq_length())
    if stored + tokens > layer.max_cache_len:
        raise ValueError(
            f"the key/value cache must hold the {pluralize(stored + tokens, 'token')} of a row, "
            f"got a StaticCache of {layer.max_cache_len}. Set its max_cache_len to the tokens of "
            "prompt and completion together."
        )
