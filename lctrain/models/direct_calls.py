"""CallSwap: serves libraries that call `model.forward` and thereby skip the model's hooks.

sentence-transformers 6 does so. A patched model finds documents and padding in its hooks.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

_INSIDE = "_lctrain_inside_call"
_LIBRARIES = ("sentence_transformers",)


class CallSwap:
    """A Swap that makes `model.forward(...)` run the model's hooks, as `model(...)` does.

    It implements `lctrain.models.swap.Swap`, and is applied after all others.

    Args:
        model: A patched transformers model.
    """

    name = "calls"

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model
        self._own: Any = type(model)

    def apply(self) -> None:
        """Changes the model's class to a subclass whose forward calls the model once."""
        self._own = type(self._model)
        self._model.__class__ = hooked_class(self._own)

    def undo(self) -> None:
        """Restores the model's class."""
        self._model.__class__ = self._own

    def describe(self) -> str:
        """Returns what changes, for the report of PatchHandle."""
        return "model.forward runs the hooks"


@functools.cache
def hooked_class(own: Any) -> Any:
    """Returns a subclass of a model's class whose `forward` runs hooks if it is called directly.

    Args:
        own: The model's own class.
    """

    @functools.wraps(own.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(self, _INSIDE, False):
            return own.forward(self, *args, **kwargs)
        return self(*args, **kwargs)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        outer = getattr(self, _INSIDE, False)
        object.__setattr__(self, _INSIDE, True)
        try:
            return own.__call__(self, *args, **kwargs)
        finally:
            object.__setattr__(self, _INSIDE, outer)

    changes = {
        "forward": forward,
        "__call__": call,
        "__module__": own.__module__,
        "lctrain_own_forward": getattr(own, "lctrain_own_forward", own.forward),
    }
    return type(own.__name__, (own,), changes)


def skips_hooks(module: nn.Module) -> bool:
    """Returns whether a module belongs to a library that calls `forward` of the models inside."""
    return any(base.__module__.startswith(_LIBRARIES) for base in type(module).__mro__)
