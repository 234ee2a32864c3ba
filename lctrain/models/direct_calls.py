"""CallSwap: serves libraries that call `model.forward` and thereby skip the model's hooks.

sentence-transformers 6 does so. A patched model finds documents and padding in its hooks.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

from torch import nn

from lctrain.made_class import makes_class

_threads = threading.local()
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


@makes_class
def hooked_class(own: Any) -> Any:
    """Returns a subclass of a model's class whose `forward` runs hooks if it is called directly.

    Args:
        own: The model's own class.
    """

    @functools.wraps(own.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if id(self) in _inside():
            return own.forward(self, *args, **kwargs)
        return self(*args, **kwargs)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        inside = _inside()
        outer = id(self) in inside
        inside.add(id(self))
        try:
            return own.__call__(self, *args, **kwargs)
        finally:
            if not outer:
                inside.discard(id(self))

    changes = {
        "forward": forward,
        "__call__": call,
        "__module__": own.__module__,
        "lctrain_own_forward": getattr(own, "lctrain_own_forward", own.forward),
    }
    return type(own.__name__, (own,), changes)


def _inside() -> set[int]:
    """Returns the ids of the models that this thread is calling; another thread's do not count."""
    if not hasattr(_threads, "inside"):
        _threads.inside = set()
    inside: set[int] = _threads.inside
    return inside


def skips_hooks(module: nn.Module) -> bool:
    """Returns whether a module belongs to a library that calls `forward` of the models inside."""
    return any(base.__module__.startswith(_LIBRARIES) for base in type(module).__mro__)
