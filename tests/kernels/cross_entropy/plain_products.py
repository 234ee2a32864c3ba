"""Computes the matrix products of linear cross-entropy in plain PyTorch, for comparison.

The shapes are those of the operator's products.
"""

import torch
from torch import Tensor
from torch.nn import functional

CHUNK_TOKENS = 8


def plain_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Computes functional.linear; in float32 on a GPU in chunks of tokens, as the operator does.

    cuBLAS chooses the order of additions by shape. The error of a float32 product is rounding
    alone, so two shapes can differ by more than the allowed factor of two.
    """
    if hidden.dtype != torch.float32 or not hidden.is_cuda:
        return functional.linear(hidden, weight, bias)
    parts = hidden.split(CHUNK_TOKENS)
    return torch.cat([functional.linear(part, weight, bias) for part in parts])
