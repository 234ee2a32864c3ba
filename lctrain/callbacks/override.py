"""Override: another method on one object, and the old one back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Override:
    """Replaces a method of one object by a function, until `restore`.

    Args:
        target: The object, a LightningModule for example.
        name: Name of the method.
        make: Function from the bound method to the function that replaces it.
    """

    def __init__(self, target: Any, name: str, make: Callable[[Any], Callable[..., Any]]) -> None:
        self._target = target
        self._name = name
        self._own = vars(target).get(name)  # torch.compile puts functions there, too
        self.function = make(getattr(target, name))
        setattr(target, name, self.function)

    def restore(self) -> None:
        """Restores the method.

        Does nothing if it is restored, or if something else has replaced it.
        """
        if vars(self._target).get(self._name) is not self.function:
            return
        delattr(self._target, self._name)
        if self._own is not None:
            setattr(self._target, self._name, self._own)
