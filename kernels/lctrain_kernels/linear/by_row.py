"""by_row: applies a function to every row alone, so that no result depends on the other rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def by_row(function: Callable[..., Tensor], *tensors: Tensor, dim: int = 0) -> Tensor:
    """Returns `function` of every row of tensors [T, ...], joined along `dim`.

    Every call sees a new copy of one row. So its shapes, strides and alignment are the same
    wherever the row was: the order of sums, and the use of vector instructions, are too.

    Args:
        function: Function from tensors [1, ...] to a tensor whose dimension `dim` has size 1.
        tensors: Tensors with T rows each.
        dim: Dimension of the rows in the result.
    """
    count = len(tensors[0])
    if not count:
        return function(*tensors)
    rows = [function(*(x[i : i + 1].clone() for x in tensors)) for i in range(count)]
    return torch.cat(rows, dim)
