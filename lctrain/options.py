"""Builds LongContextModule's options from mappings, and compares them after a resume."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from lctrain.config import OptimConfig


def check_same_options(now: OptimConfig, then: Mapping[str, Any]) -> None:
    """Raises a ValueError if a resumed run has other optimizer options than its checkpoint.

    Args:
        now: Options of this run.
        then: Options of the checkpoint, by name. Options missing from the checkpoint are not
            compared.

    Raises:
        ValueError: if an option has changed; the message names it.
    """
    values = asdict(now)
    changes = [
        f"optim.{name} was {value!r}, is {values[name]!r}"
        for name, value in then.items()
        if name in values and values[name] != value
    ]
    if changes:
        raise ValueError(
            "a resumed run must have the optimizer options of its checkpoint, got others: "
            f"{'; '.join(changes)}. Restore them, or start a new run without ckpt_path."
        )


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
