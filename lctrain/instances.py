"""require_instance, require_int: arguments of public functions have the type that is documented."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def require_instance(name: str, value: Any, kinds: type | tuple[type, ...], remedy: str) -> None:
    """Raises a TypeError unless a value is an instance of a type.

    Args:
        name: Name of the argument, for the message.
        value: The argument.
        kinds: The type, or several.
        remedy: Sentence that says what to pass.
    """
    if isinstance(value, kinds):
        return
    several = kinds if isinstance(kinds, tuple) else (kinds,)
    words = " or ".join(_words(kind) for kind in several)
    raise TypeError(f"{name} must be {words}, got {type(value).__name__}. {remedy}")


def require_int(name: str, value: Any, least: int, remedy: str) -> None:
    """Raises unless a value is an int, and not too small.

    Args:
        name: Name of the argument, for the message.
        value: The argument.
        least: Smallest number that is allowed.
        remedy: Sentence that says what to pass.

    Raises:
        TypeError: if the value is no int.
        ValueError: if it is below `least`.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}. {remedy}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}. {remedy}")


def require_sequence(name: str, value: Any, remedy: str) -> None:
    """Raises a TypeError unless a value is a list or another sequence, and no text.

    Args:
        name: Name of the argument, for the message.
        value: The argument.
        remedy: Sentence that says what to pass.
    """
    is_list = isinstance(value, Sequence) or (hasattr(value, "__len__") and hasattr(value, "shape"))
    if isinstance(value, str) or not is_list:
        raise TypeError(f"{name} must be a list, got {type(value).__name__}. {remedy}")


def require_callable(name: str, value: Any, remedy: str) -> None:
    """Raises a TypeError unless a value is a function, or can be called like one.

    Args:
        name: Name of the argument, for the message.
        value: The argument.
        remedy: Sentence that says what to pass.
    """
    if not callable(value):
        raise TypeError(f"{name} must be callable, got {type(value).__name__}. {remedy}")


def _words(kind: type) -> str:
    """Returns a type's name with an article."""
    name = {"type": "class", "str": "text"}.get(kind.__name__, kind.__name__)
    return f"{'an' if name[0].lower() in 'aeio' else 'a'} {name}"
