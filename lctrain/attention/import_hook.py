"""Registers lctrain's attention with transformers as soon as transformers is imported.

`import lctrain` is enough for `from_pretrained(..., attn_implementation="lctrain_flash")`. It does
not import transformers, which takes seconds to import and which `lctrain.kernels` works without.
The module with the registration functions is passed by name, since it imports this package.
"""

import importlib
import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_TARGETS = {
    "transformers.modeling_utils": "register",
    "transformers.models.auto.configuration_auto": "register_families_on_demand",
}
"""Module of transformers -> the registration function to call once that module is imported."""


def register_with_transformers(registration: str) -> None:
    """Calls the functions of _TARGETS, each as soon as its module of transformers is imported.

    If the module is imported already, its function is called now.

    Args:
        registration: Name of the module that holds the functions of _TARGETS.
    """
    waiting = {finder.target for finder in sys.meta_path if isinstance(finder, _Finder)}
    for target, function in _TARGETS.items():
        if target in sys.modules:
            _register(registration, function)
        elif target not in waiting:
            sys.meta_path.insert(0, _Finder(target, registration, function))


class _Finder(MetaPathFinder):
    """An import finder that calls a registration function once its target module is loaded.

    The other finders find and load the module.
    """

    def __init__(self, target: str, registration: str, function: str) -> None:
        self.target = target
        self.registration = registration
        self.function = function

    def find_spec(
        self, fullname: str, path: Any = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.target:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _register(self.registration, self.function)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _register(registration: str, function: str) -> None:
    getattr(importlib.import_module(registration), function)()
