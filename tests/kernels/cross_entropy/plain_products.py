"""The matrix products of the loss in plain PyTorch, in the shapes that the operator multiplies."""

import torch
from torch import Tensor
from torch.nn import functional

CHUNK_TOKENS = 8


def plain_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """functional.linear; float32 on a GPU in chunks of tokens, as the operator multiplies.

    cuBLAS picks an order of additions by shape. In float32, where rounding in a product is all of
    its error, two shapes can differ by more than the factor of two that the rule allows.
    """
    if hidden.dtype != torch.float32 or not hidden.is_cuda:
        return functional.linear(hidden, weight, bias)
    parts = hidden.split(CHUNK_TOKENS)
    return torch.cat([functional.linear(part, weight, bias) for part in parts])
