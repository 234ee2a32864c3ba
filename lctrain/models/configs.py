"""ConfigSwap: replaces the configs of a model by copies while the model is patched."""

import copy
from typing import Any

from torch import nn

_IMPLEMENTATION = "_attn_implementation_internal"


class ConfigSwap:
    """Replaces every config in a model by a shallow copy that names another attention.

    transformers reads the name of the attention from the config. Models may share a config, so
    changing the config itself would change the attention of other models too.

    Args:
        model: A transformers model.
        implementation: Name of the attention in transformers, such as "lctrain_flash".
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
        """Replaces the configs by their copies."""
        for module, name, old in self._places:
            setattr(module, name, self._pairs[id(old)][1])

    def restore(self) -> None:
        """Restores the original configs.

        Values that were written to the copies meanwhile, except the attention's name, are kept.
        """
        for old, new in self._pairs.values():
            implementation = getattr(old, _IMPLEMENTATION)
            vars(old).clear()
            vars(old).update(vars(new))
            setattr(old, _IMPLEMENTATION, implementation)
        for module, name, old in self._places:
            setattr(module, name, old)
