"""Computes the loss's matrix products in plain PyTorch, in the shapes that the operator uses."""

import torch
from torch import Tensor
from torch.nn import functional

CHUNK_TOKENS = 8


def plain_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Computes functional.linear; in float32 on a GPU in chunks of tokens, as the operator does.

    cuBLAS chooses the order of additions by shape. A float32 product's error is rounding alone, so
    two shapes can differ by more than the allowed factor of two.
    """
    if hidden.dtype != torch.float32 or not hidden.is_cuda:
        return functional.linear(hidden, weight, bias)
    parts = hidden.split(CHUNK_TOKENS)
    return torch.cat([functional.linear(part, weight, bias) for part in parts])
