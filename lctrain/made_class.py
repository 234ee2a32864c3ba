"""makes_class: lets pickle and copy handle objects of classes that are made at run time.

A patched module has a subclass of its own class, which has no place in a file. pickle stores how
the class is made, and makes it again: the same class in the same process.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

MADE_BY = "lctrain_made_by"


class Made(NamedTuple):
    """How a class is made.

    Attributes:
        make: Function that `makes_class` decorates.
        arguments: Its arguments; a class among them that is made at run time is a Made itself.
    """

    make: Callable[..., type]
    arguments: tuple[Any, ...]


def makes_class(make: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a function that makes a class: equal arguments give one class, for pickle too.

    Args:
        make: Function at the top of a module. Its arguments are hashable and can be pickled.
    """

    @functools.cache
    @functools.wraps(make)
    def once(*arguments: Any) -> Any:
        made = make(*arguments)
        setattr(made, MADE_BY, Made(once, tuple(map(_describe, arguments))))
        made.__reduce_ex__ = _reduce
        return made

    return once


def _describe(value: Any) -> Any:
    """Returns how a class was made, if `makes_class` made it; other values are returned."""
    return vars(value).get(MADE_BY, value) if isinstance(value, type) else value


def _make(value: Any) -> Any:
    """Returns the class that a Made describes; other values are returned."""
    return value.make(*map(_make, value.arguments)) if isinstance(value, Made) else value


def _reduce(self: Any, protocol: Any) -> Any:
    """Returns pickle's parts of an object, with its class as a Made."""
    made = _describe(type(self))
    parts = object.__reduce_ex__(self, max(int(protocol), 2))
    if not isinstance(made, Made) or isinstance(parts, str):
        return parts
    return _new, (made, *parts[1][1:]), *parts[2:]


def _new(made: Made, *arguments: Any) -> Any:
    """Returns a new object of a class, without its state."""
    kind = _make(made)
    return kind.__new__(kind, *arguments)
