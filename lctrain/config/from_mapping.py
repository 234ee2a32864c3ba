"""Makes the settings of an object that is built from Python: a dataclass, or a mapping."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any


def as_dataclass(name: str, schema: type[Any], value: Any) -> Any:
    """Returns `value` if it is a `schema`, else the `schema` built from a mapping of its fields.

    Args:
        name: Name of the argument, for messages.
        schema: A dataclass.
        value: An instance of `schema`, or a mapping.

    Raises:
        ValueError: if `value` is neither, or the mapping has an unknown field.
    """
    if isinstance(value, schema):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(
            f"{name} must be a {schema.__name__} or a mapping of its fields, got "
            f"{type(value).__name__}. Pass {schema.__name__}(...)."
        )
    known = [field.name for field in fields(schema)]
    unknown = sorted(set(value) - set(known))
    if unknown:
        raise ValueError(
            f"{name} must have fields of {schema.__name__} ({', '.join(known)}), got "
            f"{', '.join(unknown)}. Check the spelling."
        )
    return schema(**value)
