"""Registers lctrain's attention with transformers as soon as transformers is imported.

After `import lctrain`, `from_pretrained(..., attn_implementation="lctrain_flash")` works. But
`import lctrain` does not import transformers, which takes seconds, and which `lctrain.kernels` does
not need. The module with the registration functions imports this package, so it is passed by name.
"""

import importlib
import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from lctrain.instances import require_instance

_TARGETS = {
    "transformers.modeling_utils": "register",
    "transformers.models.auto.configuration_auto": "register_families_on_demand",
}
"""Module of transformers -> the registration function to call once that module is imported."""


def register_with_transformers(registration: str) -> None:
    """Calls each function of _TARGETS when the transformers module it needs is imported.

    If that module is imported already, its function is called immediately.

    Args:
        registration: Name of the module that holds the functions of _TARGETS.
    """
    require_instance("registration", registration, str, "Pass the name of a module.")
    waiting = {finder.target for finder in sys.meta_path if isinstance(finder, _Finder)}
    for target, function in _TARGETS.items():
        if target in sys.modules:
            _register(registration, function)
        elif target not in waiting:
            sys.meta_path.insert(0, _Finder(target, registration, function))


class _Finder(MetaPathFinder):
    """Import finder that calls a registration function after its target module is loaded.

    Python's other finders find and load the module.
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
    module = None
    try:
        module = importlib.import_module(registration)
    except ModuleNotFoundError as error:
        if error.name != registration:
            raise
    if not hasattr(module, function):
        raise ValueError(
            f"registration must name a module with the function {function}, got {registration}, "
            "which has none or cannot be imported. Pass lctrain.models.registration."
        )
    getattr(module, function)()
