"""set_unchanged: the `__setattr__` of PackedBatch, whose fields Lightning sets to themselves."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor


def set_unchanged(batch: Any, name: str, value: Any) -> None:
    """Serves as `__setattr__` of PackedBatch: it accepts only an attribute's current value.

    The `__setattr__` of a frozen dataclass always raises. But Lightning's convert_input (precision
    "bf16-true", FSDP) sets every field of a dataclass to its current value.
    """
    if name not in batch.__dict__ or not _same(batch.__dict__[name], value):
        raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}")


def _same(old: Any, new: Any) -> bool:
    if isinstance(old, tuple) and isinstance(new, tuple):
        return len(old) == len(new) and all(map(_same, old, new))
    return old is new or (not isinstance(old, Tensor) and type(old) is type(new) and old == new)
