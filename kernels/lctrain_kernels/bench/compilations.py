"""loaded_kernels: lists the Triton kernels that are loaded during a measurement."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def loaded_kernels() -> Iterator[list[str]]:
    """Context manager that yields a list, to which the names of loaded Triton kernels are added.

    A kernel is loaded once, before its first launch: it is compiled, or read from Triton's cache.
    The list stays empty without Triton.
    """
    names: list[str] = []
    if importlib.util.find_spec("triton") is None:
        yield names
        return
    import triton

    def loaded(module: Any, function: Any, name: str, *_: Any) -> None:
        names.append(name)

    hooks: Any = triton.knobs.runtime.kernel_load_end_hook
    hooks.add(loaded)
    try:
        yield names
    finally:
        hooks.remove(loaded)
