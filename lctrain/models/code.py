"""Reads the bytecode and signatures of a model's classes, to find out what they compute.

transformers has hundreds of model families, most of them copies of a few templates. So lctrain
recognises a module by what its code does, and not by its name.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator, Mapping
from types import CellType, CodeType, FunctionType
from typing import Any

from torch import nn


def methods(cls: type) -> Iterator[CodeType]:
    """Yields the code object of every method of a class, without those of torch.nn's classes.

    Decorators that set `__wrapped__` are removed first.
    """
    for base in cls.__mro__:
        if base.__module__.startswith(("torch.nn", "transformers.modeling_")):
            continue  # PreTrainedModel names the interface too, and calls no attention
        for member in vars(base).values():
            function = inspect.unwrap(member) if callable(member) else member
            if isinstance(function, FunctionType):
                yield function.__code__


def strings(code: CodeType) -> Iterator[str]:
    """Yields every string constant in a function's code, names of keyword arguments included."""
    pending = list(code.co_consts)
    while pending:
        constant = pending.pop()
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, tuple):
            pending.extend(constant)
        elif isinstance(constant, CodeType):
            pending.extend(constant.co_consts)


def uses_name(module: nn.Module, name: str) -> bool:
    """Returns whether a method of a module's class uses `name` as a global or an attribute."""
    return any(name in code.co_names for code in methods(type(module)))


def reads_argument(module: nn.Module, name: str) -> bool:
    """Returns whether a method of a module has `name` as an argument, variable or string."""
    return any(name in code.co_varnames or name in strings(code) for code in methods(type(module)))


def parameters(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    """Returns the parameters of a module's forward by name, without `self`."""
    found = dict(inspect.signature(type(module).forward).parameters)
    found.pop("self", None)
    return found


def hands_keywords_on(module: nn.Module) -> bool:
    """Returns whether a module's forward accepts **kwargs, and some method passes **kwargs on.

    A call with *args alone does not count: the instruction's argument is odd if it has **kwargs.
    """
    kinds = [parameter.kind for parameter in parameters(module).values()]
    return inspect.Parameter.VAR_KEYWORD in kinds and any(
        instruction.opname == "CALL_FUNCTION_EX"
        and (instruction.arg is None or instruction.arg & 1)
        for code in methods(type(module))
        for instruction in dis.get_instructions(code)
    )


def multiplies_matrices(function: Any) -> bool:
    """Returns whether a function uses the operator @."""
    return any(
        instruction.opname == "BINARY_MATRIX_MULTIPLY" or instruction.argrepr == "@"
        for instruction in dis.get_instructions(function)
    )


def unwrapped(function: Any) -> FunctionType | None:
    """Removes decorators that set `__wrapped__`, and returns the innermost function.

    Returns None if that object is not a Python function.
    """
    function = inspect.unwrap(function)
    return function if isinstance(function, FunctionType) else None


def says(function: Any, word: str) -> bool:
    """Returns whether a function's bytecode contains `word` as a name or a constant.

    Decorators that set `__wrapped__` are removed first.
    """
    code = getattr(inspect.unwrap(function), "__code__", None) if function is not None else None
    return code is not None and word in code.co_names + code.co_consts


def find_wrapper(function: Any, name: str, file: str) -> Any:
    """Returns the function that one decorator put around another function; None if it was not used.

    Args:
        function: A function, which may have several decorators.
        name: Name of the wrapping function inside the decorator, such as "wrapper".
        file: Part of the name of the file that defines the decorator.
    """
    while function is not None:
        code = getattr(function, "__code__", None)
        if code is not None and code.co_name == name and file in code.co_filename:
            return function
        function = getattr(function, "__wrapped__", None)
    return None


def own_forward(cls: type) -> FunctionType | None:
    """Returns a class's forward; None if its decorators do more than rename arguments."""
    forward = getattr(cls, "forward", None)
    plain = isinstance(forward, FunctionType) and only_renames_arguments(forward)
    return forward if plain else None


def same_code(function: Any, other: Any) -> bool:
    """Returns whether two functions have the same bytecode, names and constants.

    Docstrings and annotations are ignored, and decorators that set `__wrapped__` are removed first.
    So a copy of Llama's norm is recognised in every model family.
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
    """Returns whether a function's only decorators are transformers' for renamed arguments."""
    while hasattr(function, "__wrapped__"):
        if function.__globals__.get("__name__") != "transformers.utils.deprecation":
            return False
        function = function.__wrapped__
    return True


def with_globals(function: FunctionType, **names: Any) -> FunctionType:
    """Returns a copy of a function that sees other values of some global names.

    The decorators of the function are copied too, each around the copy of the function it wraps.

    Args:
        function: A function, with or without decorators.
        **names: New values of global names that the innermost function uses.
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
