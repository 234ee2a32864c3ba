"""Finds and checks the key/value cache among a call's arguments; its name depends on the model."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lctrain.attention.cached import is_cached_rows, left_padded_rows
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


def stepping_cache(arguments: Mapping[str, Any]) -> Any:
    """Returns the PagedCache among a call's arguments, which makes a CacheStep; None without one.

    Args:
        arguments: Keyword arguments of a model.
    """
    cache = given_cache(arguments)
    if cache is None:  # of None, torch.compile of torch 2.11 cannot trace hasattr
        return None
    return cache if hasattr(type(cache), "begin_step") else None


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


def _fixed_layers(arguments: Mapping[str, Any]) -> list[Any]:
    """Returns the layers of a call's cache that have a fixed size, those without a window first."""
    layers = getattr(given_cache(arguments), "layers", ())
    fixed = [layer for layer in layers if isinstance(getattr(layer, "max_cache_len", None), int)]
    return sorted(fixed, key=_slides)


def _slides(layer: Any) -> bool:
    """Returns whether a layer of a cache forgets keys that are behind a window."""
    return bool(getattr(layer, "is_sliding", False))


def forgets_keys(arguments: Mapping[str, Any]) -> bool:
    """Returns whether a call's cache has layers that forget keys behind a window."""
    return any(_slides(layer) for layer in getattr(given_cache(arguments), "layers", ()))


def give_rows(arguments: dict[str, Any], rows: int, tokens: int) -> None:
    """Replaces masks that transformers made for a cache of fixed size by results of cached_rows.

    transformers makes the masks before the model is called. Where a layer with a window gets
    exactly the keys in its window, they are padding masks, of which the model would cut off columns
    once more. Masks of one query per row are results of cached_rows already.

    Args:
        arguments: Keyword arguments of a model, which are changed.
        rows: Rows B of the call.
        tokens: Tokens S per row of the call.

    Raises:
        ValueError: if a row has padding after a token.
    """
    if torch.compiler.is_compiling():
        return
    fixed = _fixed_layers(arguments)
    if not fixed or not _slides(fixed[-1]):
        return
    mask = arguments.get("attention_mask")
    keys = fixed[-1].get_mask_sizes(tokens)[0]
    if isinstance(mask, dict):
        arguments["attention_mask"] = {
            kind: left_padded_rows(one, rows, one.shape[1], one.device)
            if isinstance(one, Tensor) and one.dim() == 2
            else one
            for kind, one in mask.items()
        }
    elif _slides(fixed[0]) and isinstance(mask, Tensor) and tuple(mask.shape) == (rows, keys):
        found = left_padded_rows(mask, rows, keys, mask.device)
        if keys != fixed[0].get_seq_length() + tokens:  # else the model cuts off nothing
            arguments["attention_mask"] = found


def refuse_full(
    arguments: Mapping[str, Any], rows: int, tokens: int, window: int | None = None
) -> None:
    """Raises a ValueError if a cache of fixed size has no room for a call's tokens.

    A cache whose layers all have the model's window forgets keys, and is never full. A call with
    one token per row is checked on a CPU only: reading the length of the cache from a GPU would
    synchronise.

    Args:
        arguments: Keyword arguments of a model.
        rows: Rows B of the call.
        tokens: Tokens S per row of the call.
        window: Keys in the window of the model's layers; None without windows.
    """
    fixed = _fixed_layers(arguments)
    if not fixed or torch.compiler.is_compiling():
        return
    layer = fixed[0]
    keys = layer.keys if layer.is_initialized else None
    if keys is not None and keys.shape[0] != rows:
        raise ValueError(
            f"the key/value cache must have a row per row of the input ({rows}), got a StaticCache "
            f"with {pluralize(keys.shape[0], 'row')}. Make a new cache for each batch."
        )
    if _slides(layer) and window is not None and layer.max_cache_len >= window:
        return
    if (
        tokens == 1
        and isinstance(layer.get_seq_length(), Tensor)
        and layer.keys.device.type != "cpu"
    ):
        return
    stored = int(layer.get_seq_length())
    if stored + tokens > layer.max_cache_len:
        raise ValueError(
            f"the key/value cache must hold the {pluralize(stored + tokens, 'token')} of a row, "
            f"got a StaticCache of {layer.max_cache_len}. Set its max_cache_len to the tokens of "
            "prompt and completion together."
        )
