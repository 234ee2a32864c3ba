"""Copies small tensors, such as boundaries and ALiBi slopes, that are not contiguous."""

from typing import Any

from torch import Tensor


def unit_stride(*vectors: Tensor | None) -> tuple[Any, ...]:
    """Returns each tensor in contiguous memory; copies only where needed.

    The kernels assume stride 1 and would read an expanded or sliced tensor beyond its elements.

    Args:
        vectors: Tensors of any shape; None stays None.
    """
    return tuple(None if vector is None else vector.contiguous() for vector in vectors)
