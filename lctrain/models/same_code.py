"""Whether two functions are the same computation: what a swap relies on, instead of names."""

from __future__ import annotations

import inspect
from types import CellType, CodeType, FunctionType
from typing import Any


def same_code(function: Any, other: Any) -> bool:
    """Returns whether two functions have the same bytecode, names and constants.

    Decorators that keep `__wrapped__` are looked through; docstrings and annotations do not count.
    transformers generates most families from a few, so that a copy of Llama's norm is found in
    whatever family it is.
    """
    function, other = inspect.unwrap(function), inspect.unwrap(other)
    if not isinstance(function, FunctionType) or not isinstance(other, FunctionType):
        return False
    return _essence(function.__code__, function.__doc__) == _essence(other.__code__, other.__doc__)


def _essence(code: CodeType, doc: str | None) -> tuple[Any, ...]:
    constants = tuple(
        _essence(constant, None) if isinstance(constant, CodeType) else constant
        for constant in code.co_consts
        if doc is None or constant != doc
    )
    return code.co_code, code.co_names, constants, code.co_varnames


def only_renames_arguments(function: FunctionType) -> bool:
    """Whether the decorators of a function, if any, are transformers' for renamed arguments."""
    while hasattr(function, "__wrapped__"):
        if function.__globals__.get("__name__") != "transformers.utils.deprecation":
            return False
        function = function.__wrapped__
    return True


def with_globals(function: FunctionType, **names: Any) -> FunctionType:
    """Returns the same function with other values for some global names of its module.

    Every decorator is copied around the copy of the function that it wraps.
    """
    inner = getattr(function, "__wrapped__", None)
    if inner is None:
        return _copy(function, function.__globals__ | names, function.__closure__)
    replaced = with_globals(inner, **names)
    closure = tuple(
        CellType(replaced) if cell.cell_contents is inner else cell
        for cell in function.__closure__ or ()
    )
    copy = _copy(function, function.__globals__, closure)
    copy.__wrapped__ = replaced  # type: ignore[attr-defined]
    return copy


def _copy(
    function: FunctionType, names: dict[str, Any], closure: tuple[CellType, ...] | None
) -> FunctionType:
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, closure)
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__qualname__ = function.__qualname__
    copy.__module__ = function.__module__
    copy.__annotations__ = function.__annotations__
    copy.__doc__ = function.__doc__
    return copy
