"""ConfigSwap: replaces the configs of a patched model by copies, until it is unpatched."""

import copy
from typing import Any

from torch import nn

_IMPLEMENTATION = "_attn_implementation_internal"


class ConfigSwap:
    """Replaces every config in a model by a shallow copy that names another attention.

    transformers reads the attention's name from the config, which models may share: writing into it
    would patch, and later unpatch, models that nobody asked for.
    """

    def __init__(self, model: nn.Module, implementation: str) -> None:
        from transformers import PreTrainedConfig

        self._pairs: dict[int, tuple[Any, Any]] = {}
        self._places: list[tuple[nn.Module, str, Any]] = []
        for module in model.modules():
            for name, value in list(vars(module).items()):
                if isinstance(value, PreTrainedConfig):
                    old, new = self._pairs.setdefault(id(value), (value, copy.copy(value)))
                    setattr(new, _IMPLEMENTATION, implementation)
                    self._places.append((module, name, old))

    def apply(self) -> None:
        """Puts the copies in the places of the configs."""
        for module, name, old in self._places:
            setattr(module, name, self._pairs[id(old)][1])

    def restore(self) -> None:
        """Restores the old configs, with other values that were written to the copies since."""
        for old, new in self._pairs.values():
            implementation = getattr(old, _IMPLEMENTATION)
            vars(old).clear()
            vars(old).update(vars(new))
            setattr(old, _IMPLEMENTATION, implementation)
        for module, name, old in self._places:
            setattr(module, name, old)
