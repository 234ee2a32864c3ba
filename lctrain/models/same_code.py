"""Whether two functions are the same computation: what a swap relies on, instead of names."""

from __future__ import annotations

import inspect
from types import CodeType, FunctionType
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


def with_globals(function: FunctionType, **names: Any) -> FunctionType:
    """Returns the same function with other values for some global names of its module."""
    copy = FunctionType(
        function.__code__,
        function.__globals__ | names,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__qualname__ = function.__qualname__
    copy.__module__ = function.__module__
    copy.__annotations__ = function.__annotations__
    copy.__doc__ = function.__doc__
    return copy
