"""The key/value cache among a model's arguments: its name depends on transformers' version."""

from collections.abc import Mapping
from typing import Any

CACHE_ARGUMENTS = ("cache", "past_key_values")
"""`cache` from transformers 5.24 on, which takes `past_key_values` too; only that before."""


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """Returns the cache that a model or a layer was called with, None if it got none.

    Args:
        arguments: Keyword arguments of the call.
    """
    for name in CACHE_ARGUMENTS:
        if arguments.get(name) is not None:
            return arguments[name]
    return None


def without_cache(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a call without its cache, for a layer that has updated it."""
    return {name: value for name, value in arguments.items() if name not in CACHE_ARGUMENTS}
