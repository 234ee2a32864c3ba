"""Computes the key of a variant: a hash of everything that decides its machine code.

A variant is one ahead-of-time compilation of a kernel. Triton's own cache key includes a kernel's
line in its file, comments and docstrings. They do not change machine code, so this key omits them:
a kernel that moves keeps its key.
"""

import ast
import hashlib
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from triton.runtime.jit import DependenciesFinder, JITCallable

from lctrain_kernels.tile.variant import KernelVariant

FORMAT = 1  # of the reports; another one makes every key new


def variant_key(variant: KernelVariant, target: str, version: str) -> str:
    """Returns a hash of source, signature, constants, options, target and Triton version.

    Args:
        variant: Variant to compile.
        target: Name of the GPU, for example "sm_90".
        version: Triton version.
    """
    parts = (
        FORMAT,
        source_key(variant.kernel),
        sorted((name, str(kind)) for name, kind in variant.signature.items()),
        _sorted(variant.constants),
        _sorted(variant.attributes),
        _sorted(variant.options),
        variant.spill_free,
        target,
        version,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def source_key(kernel: JITCallable) -> str:
    """Returns a hash of a kernel's code and of all device functions that it calls."""
    with _keys_of_code():
        return kernel.cache_key


def code_of(source: str) -> str:
    """Returns Python source without comments, docstrings and layout."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


_KEYS: dict[int, str] = {}


def _code_key(self: JITCallable) -> str:
    """Replaces JITCallable.cache_key; a caller's key includes its callees' keys, as in Triton."""
    if id(self) not in _KEYS:
        _KEYS[id(self)] = f"recursion:{self.__name__}"
        finder = DependenciesFinder(
            name=self._fn_name,
            globals=self.__globals__,
            nonlocals=inspect.getclosurevars(self.fn).nonlocals,
            src=code_of(self.src),
        )
        finder.visit(self.parse())
        self.used_global_vals = dict(sorted(finder.used_global_vals.items()))
        values = sorted((name, _stable(value)) for (name, _), (value, _) in _values(self))
        _KEYS[id(self)] = hashlib.sha256(repr((finder.ret, values)).encode()).hexdigest()
    return _KEYS[id(self)]


def _values(kernel: JITCallable) -> Iterator[tuple[tuple[str, int], tuple[object, dict]]]:
    yield from kernel.used_global_vals.items()


def _stable(value: object) -> str:
    if isinstance(value, type):  # a named tuple's fields are what the kernel reads
        return f"{value.__name__}{getattr(value, '_fields', '')}"
    return repr(value)


def _sorted(values: Mapping) -> list[tuple[str, str]]:
    return sorted((repr(key), repr(value)) for key, value in values.items())


@contextmanager
def _keys_of_code() -> Iterator[None]:
    original = JITCallable.__dict__["cache_key"]
    JITCallable.cache_key = property(_code_key)
    try:
        yield
    finally:
        JITCallable.cache_key = original
