"""Finds the key/value cache among a call's arguments, where its name depends on the model."""

from collections.abc import Mapping
from typing import Any

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
