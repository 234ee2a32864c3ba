"""The matrix products of a chunk of tokens: logits, and gradients of hidden states and weight.

Half-precision inputs on a GPU give half-precision logits, in one buffer that all chunks share, and
cuBLAS accumulates the weight's gradient in float32. In all other cases logits and gradients are
float32 (float64 for float64 inputs).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lctrain_kernels.linear.batch_invariant import product_into

# Number of rows of a half-precision weight that are converted to float32 at a time, if the device
# has no matrix product with half-precision inputs and a float32 result.
VOCABULARY_BLOCK = 16384
# The row stride of the logits is a multiple of this number of elements, so that rows are aligned
# for vector loads and for cuBLAS for any vocabulary size.
ROW_MULTIPLE = 64


def logits_buffer(
    tokens: int, vocabulary: int, matmul_dtype: torch.dtype, backend: str, device: torch.device
) -> Tensor:
    """Allocates the buffer for the logits of one chunk, [tokens, vocabulary], with aligned rows.

    Args:
        tokens: Number of tokens of a chunk.
        vocabulary: Number of vocabulary entries on this rank.
        matmul_dtype: Dtype of the products' inputs.
        backend: Implementation of the pass over the logits: "triton" or "pytorch".
        device: Device of the logits.
    """
    dtype = (
        matmul_dtype if backend == "triton" else torch.promote_types(matmul_dtype, torch.float32)
    )
    width = -(-vocabulary // ROW_MULTIPLE) * ROW_MULTIPLE
    return torch.empty(tokens, width, dtype=dtype, device=device)[:, :vocabulary]


def project(
    hidden: Tensor,
    weight: Tensor,
    adapter: tuple[Tensor, Tensor] | None,
    out: Tensor,
    batch_invariant: bool = False,
) -> None:
    """Computes the logits out [C, V] = hidden [C, E] @ weight [V, E].T of C tokens.

    An adapter (low [C, R], up [V, R]) adds low @ up.T. With batch_invariant, the bits of a row
    depend on no other row.
    """
    if batch_invariant:
        product_into(hidden, weight, None, out)
        return
    _multiply(hidden, weight, out)
    if adapter is not None:
        low, up = adapter
        if low.dtype == out.dtype:
            out.addmm_(low, up.t())
        else:
            out.addmm_(low.to(out.dtype), up.to(out.dtype).t())


def project_back(logits_grad: Tensor, weight: Tensor, out: Tensor) -> None:
    """Computes out [C, E] = logits_grad [C, V] @ weight [V, E], in the dtype of out."""
    if logits_grad.dtype == weight.dtype:
        if out.dtype == weight.dtype:
            torch.mm(logits_grad, weight, out=out)
        elif _has_mixed_products(weight.device):
            torch.mm(logits_grad, weight, out_dtype=out.dtype, out=out)
        else:
            out.copy_(logits_grad @ weight)
        return
    if _has_mixed_products(weight.device):
        out.copy_(torch.mm(logits_grad.to(weight.dtype), weight, out_dtype=logits_grad.dtype))
        return
    total = logits_grad.new_zeros(logits_grad.shape[0], weight.shape[1])
    for start in range(0, weight.shape[0], VOCABULARY_BLOCK):
        block = slice(start, start + VOCABULARY_BLOCK)
        total.addmm_(logits_grad[:, block], weight[block].to(total.dtype))
    out.copy_(total)


def accumulate_outer(total: Tensor, logits_grad: Tensor, hidden: Tensor, *, first: bool) -> None:
    """Adds the weight's gradient of a chunk, logits_grad.T @ hidden, to `total`.

    Args:
        total: Sum over the chunks, [V, E] float32. The first chunk overwrites it.
        logits_grad: Gradient of the chunk's logits, [C, V].
        hidden: Hidden states of the chunk, [C, E].
        first: Whether this is the first chunk.
    """
    if logits_grad.dtype == total.dtype:  # float32 logits, perhaps of half-precision inputs
        total.addmm_(logits_grad.t(), hidden.to(total.dtype), beta=0.0 if first else 1.0)
        return
    transposed = logits_grad.t()
    if _has_mixed_products(total.device) and first:
        torch.mm(transposed, hidden, out_dtype=total.dtype, out=total)
    elif _accumulates_in_place(total.device):
        torch.addmm(total, transposed, hidden, out_dtype=total.dtype, out=total)
    else:
        if first:
            total.zero_()
        mixed = _has_mixed_products(total.device)
        for start in range(0, total.shape[0], VOCABULARY_BLOCK):
            block = transposed[start : start + VOCABULARY_BLOCK]
            part = total[start : start + VOCABULARY_BLOCK]
            if mixed:
                part += torch.mm(block, hidden, out_dtype=total.dtype)
            else:
                part.addmm_(block.to(total.dtype), hidden.to(total.dtype))


def _multiply(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    if hidden.dtype == out.dtype:
        torch.mm(hidden, weight.t(), out=out)
    elif _has_mixed_products(hidden.device):
        torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
    else:
        wide = hidden.to(out.dtype)
        for start in range(0, weight.shape[0], VOCABULARY_BLOCK):
            block = slice(start, start + VOCABULARY_BLOCK)
            out[:, block] = wide @ weight[block].to(out.dtype).t()


def _has_mixed_products(device: torch.device) -> bool:
    """Returns whether a device multiplies half-precision matrices into a float32 result."""
    return device.type == "cuda" and torch.version.hip is None


@functools.cache
def _accumulates_in_place(device: torch.device) -> bool:
    """Returns whether addmm adds half-precision products to a float32 matrix on a device.

    Some releases of PyTorch refuse it.
    """
    if not _has_mixed_products(device):
        return False
    half = torch.zeros(16, 16, dtype=torch.bfloat16, device=device)
    total = torch.zeros(16, 16, dtype=torch.float32, device=device)
    try:
        torch.addmm(total, half, half, out_dtype=torch.float32, out=total)
    except (RuntimeError, NotImplementedError, TypeError):
        return False
    return True
