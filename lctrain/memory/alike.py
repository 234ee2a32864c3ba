"""structure: describes layers and their arguments, so that layers of equal structure are found."""

from __future__ import annotations

import types
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

_NAMES = frozenset({"layer_idx", "layer_id", "layer_index", "block_idx", "target_name"})
"""Attributes and keys with a layer's number; its operations follow from others."""


def structure(value: Any) -> Any:
    """Returns a hashable description of a value, equal for values that take the same memory.

    Tensors are described by shape, strides, dtype and whether they need a gradient; modules by
    their class, attributes, parameters and children, without the number of the layer. An object of
    another kind is described by itself, so two different objects have different descriptions.

    Args:
        value: A module, a function, a tensor, or a container of such values.
    """
    return _describe(value, {})


def _describe(value: Any, seen: dict[int, int]) -> Any:
    """Returns the description of a value.

    Args:
        value: The value.
        seen: Identity of every module that is described already -> its number.
    """
    if isinstance(value, Tensor):
        kind = type(value), value.dtype, value.requires_grad
        return "tensor", *kind, tuple(value.shape), value.stride()
    if isinstance(value, nn.Module):
        if id(value) in seen:
            return "module", seen[id(value)]
        seen[id(value)] = len(seen)
        return type(value), _describe(vars(value), seen)
    if isinstance(value, partial):
        return "partial", _describe([value.func, value.args, value.keywords], seen)
    if isinstance(value, types.MethodType):
        return "method", value.__func__, _describe(value.__self__, seen)
    if isinstance(value, Mapping):
        items = [(name, _describe(x, seen)) for name, x in value.items() if name not in _NAMES]
        return type(value), tuple(items)
    if isinstance(value, (list, tuple)):
        return type(value), tuple(_describe(x, seen) for x in value)
    if isinstance(value, (set, frozenset)):
        return type(value), frozenset(value)
    try:
        hash(value)
    except TypeError:
        return _Same(value)
    return type(value), value


class _Same:
    """Hashable stand-in of an object that has no hash. It is equal to that of the same object."""

    def __init__(self, value: Any) -> None:
        self._value = value  # kept, so that no other object gets its identity

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._value is other._value

    def __hash__(self) -> int:
        return id(self._value)
