"""Triton's interpreter without work that it repeats in every call of a device function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

from triton.runtime import interpreter


def quicken() -> None:
    """Leaves out what a call of the interpreter has done already, for the rest of the process.

    - A launch replaces the functions of triton.language and restores them at its end. Each call of
      a device function would look for them again, among all names of the language.
    - `_get_np_dtype` makes its table again for every value.
    - Each sum, difference and product of integers is computed again in int64, for an assertion that
      it does not overflow. Without `debug`, an assertion of the device does nothing.
    """
    if not isinstance(interpreter._patch_lang, _Patch):
        builder = interpreter.interpreter_builder
        if not builder.options.debug:
            builder.options = replace(builder.options, sanitize_overflow=False)
        interpreter._patch_lang = _Patch(interpreter._patch_lang)
        interpreter._get_np_dtype = _Dtypes(interpreter._get_np_dtype)


class _Patch:
    """Replaces `_patch_lang`: in a launch it replaces the functions of a language module once."""

    def __init__(self, patch: Callable[[Any], Any]) -> None:
        self.patch = patch
        self.modules: dict[int, tuple[dict, set[ModuleType]]] = {}  # by the id of the dictionary
        self.patched: set[ModuleType] = set()
        self.is_in_launch = False

    def __call__(self, function: Any) -> Any:
        """Returns the scope that restores what was replaced."""
        names = function.__globals__
        if id(names) not in self.modules:
            languages = interpreter.tl, interpreter.tl.core
            found = {x for x in languages if any(x is y for y in names.values())}
            self.modules[id(names)] = names, found
        _, modules = self.modules[id(names)]
        if modules and modules <= self.patched:
            return interpreter._LangPatchScope()
        scope = self.patch(function)
        self.patched |= modules
        if not self.is_in_launch:
            self.is_in_launch, restore = True, scope.restore

            def end_launch() -> None:
                self.is_in_launch = False
                self.patched.clear()
                restore()

            scope.restore = end_launch
        return scope


class _Dtypes(dict):
    """Replaces `_get_np_dtype`, and keeps its results by the name of the Triton dtype."""

    def __init__(self, find: Callable[[Any], Any]) -> None:
        self.find = find

    def __call__(self, dtype: Any) -> Any:
        """Returns the dtype in which the interpreter stores values of a Triton dtype."""
        name = dtype.scalar.name
        if name not in self:
            self[name] = self.find(dtype)
        return self[name]
