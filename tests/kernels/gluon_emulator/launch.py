"""Launches the Python source of a kernel and of its helper functions in the emulator."""

import functools
import itertools
import types
from typing import Any

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from lctrain_kernels import backend
from tests.kernels.gluon_emulator.machine import Machine, Program
from tests.kernels.gluon_emulator.memory import Descriptor, Pointer
from tests.kernels.gluon_emulator.names import REPLACED
from tests.kernels.gluon_emulator.values import as_value

_AT_ONCE = 3  # programs that run side by side


def _names_in(code: types.CodeType) -> set[str]:
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*map(_names_in, inner))


def _replacement(value: Any) -> Any:
    if isinstance(value, gl.constexpr):
        return value.value
    try:
        if value in REPLACED:
            return REPLACED[value]
    except TypeError:  # not hashable
        return value
    return _emulated(value) if hasattr(value, "fn") else value


@functools.cache
def _emulated(kernel: Any) -> types.FunctionType:
    """Returns a `gluon.jit` function as a Python function that calls the emulator."""
    source = kernel.fn
    names: dict[str, Any] = {"__builtins__": source.__globals__["__builtins__"]}
    function = types.FunctionType(
        source.__code__, names, source.__name__, source.__defaults__, source.__closure__
    )
    function.__kwdefaults__ = source.__kwdefaults__
    for name in _names_in(source.__code__) & source.__globals__.keys():
        names[name] = _replacement(source.__globals__[name])
    return function


def _argument(value: Any) -> Any:
    if isinstance(value, tuple):  # a named group
        return type(value)(*map(_argument, value))
    if isinstance(value, torch.Tensor):
        return Pointer.of(value)
    if isinstance(value, TensorDescriptor):
        return Descriptor(value)
    return None if value is None else as_value(value)


class EmulatedKernel:
    """Stand-in for a Gluon kernel that runs it in the emulator.

    A launch is `EmulatedKernel(kernel)[grid](*arguments, **constants)`, as on a GPU.
    """

    def __init__(self, kernel: Any, seed: int = 0):
        self.kernel = kernel
        self.seed = seed

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return functools.partial(self._launch, tuple(int(size) for size in grid))

    def _launch(self, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        names = self.kernel.arg_names
        bound = dict(zip(names, arguments, strict=False))
        bound |= {name: options[name] for name in names if name in options}
        constants = {p.name for p in self.kernel.params if p.is_constexpr}
        bound = {n: x if n in constants else _argument(x) for n, x in bound.items()}
        function = functools.partial(_emulated(self.kernel), **bound)
        machine = Machine(self.seed)
        padded = grid + (1,) * (3 - len(grid))
        # As the hardware does: the first axis runs fastest, and a program starts when one ends.
        places = itertools.product(*map(range, reversed(padded)))
        machine.run((Program(place[::-1], padded) for place in places), function, _AT_ONCE)


def emulate(monkeypatch: Any, module: types.ModuleType, seed: int = 0) -> None:
    """Makes backend="hopper" run a module's Gluon kernels in the emulator.

    Args:
        monkeypatch: The pytest fixture.
        module: A module of lctrain_kernels with launchers.
        seed: Seed of the order in which threads and engines run.
    """
    for name, value in list(vars(module).items()):
        if isinstance(value, EmulatedKernel):
            value = value.kernel
        if hasattr(value, "is_gluon") and value.is_gluon():
            monkeypatch.setattr(module, name, EmulatedKernel(value, seed))
    monkeypatch.setattr(module, "multiprocessors", lambda device: _AT_ONCE)
    monkeypatch.setattr(backend, "hopper_serves", lambda device: True)
