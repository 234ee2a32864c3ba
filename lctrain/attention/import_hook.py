"""Registers the attention when transformers is imported, so that lctrain need not import it.

transformers takes seconds to import, and `lctrain.kernels` is promised to work without it. Yet
`import lctrain` must be enough for `from_pretrained(..., attn_implementation="lctrain_flash")`.
What registers is named by its module, since it is built on this package.
"""

import importlib
import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_TARGET = "transformers.modeling_utils"


def register_with_transformers(registration: str) -> None:
    """Registers now if transformers' models are imported, else as soon as they are.

    Args:
        registration: Module whose `register()` does it.
    """
    if _TARGET in sys.modules:
        _register(registration)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(registration))


class _Finder(MetaPathFinder):
    """Finds nothing itself: lets the others find transformers.modeling_utils, and follows it up."""

    def __init__(self, registration: str) -> None:
        self.registration = registration

    def find_spec(
        self, fullname: str, path: Any = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _TARGET:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _register(self.registration)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _register(registration: str) -> None:
    importlib.import_module(registration).register()
