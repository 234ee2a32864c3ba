"""The layout of small tensors that kernels read element by element, with stride 1."""

from typing import Any

from torch import Tensor


def unit_stride(*vectors: Tensor | None) -> tuple[Any, ...]:
    """Returns each tensor with stride 1, which the kernels assume. Copies only where needed.

    An expanded or sliced vector would otherwise be read beyond its elements.

    Args:
        vectors: Tensors of any shape; None stays None.
    """
    return tuple(None if vector is None else vector.contiguous() for vector in vectors)
