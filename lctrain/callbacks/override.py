"""Override: replaces a method of one object, and restores the method later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Override:
    """Replaces a method of one object by a function, until `restore` is called.

    Args:
        target: The object, such as a LightningModule.
        name: Name of the method.
        make: Function from the bound method to the function that replaces it.

    Attributes:
        function: The function that replaces the method.
    """

    def __init__(self, target: Any, name: str, make: Callable[[Any], Callable[..., Any]]) -> None:
        self._target = target
        self._name = name
        self._own = vars(target).get(name)  # set on the instance, as torch.compile does
        self.function = make(getattr(target, name))
        setattr(target, name, self.function)

    def restore(self) -> None:
        """Restores the method.

        Does nothing if the method is restored already, or if other code has replaced it since.
        """
        if vars(self._target).get(self._name) is not self.function:
            return
        delattr(self._target, self._name)
        if self._own is not None:
            setattr(self._target, self._name, self._own)
