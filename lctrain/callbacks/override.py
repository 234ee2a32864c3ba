"""Override: another method on one object, and the old one back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Override:
    """Puts a function in place of a method of one object, until `restore`.

    Args:
        target: The object, a LightningModule for example.
        name: Name of the method.
        make: Gets the bound method as it was, returns the function that takes its place.
    """

    def __init__(self, target: Any, name: str, make: Callable[[Any], Callable[..., Any]]) -> None:
        self._target = target
        self._name = name
        self._own = vars(target).get(name)  # torch.compile puts functions there, too
        self.function = make(getattr(target, name))
        setattr(target, name, self.function)

    def restore(self) -> None:
        """Takes the function away. Harmless if done before, or if another took its place."""
        if vars(self._target).get(self._name) is not self.function:
            return
        delattr(self._target, self._name)
        if self._own is not None:
            setattr(self._target, self._name, self._own)
