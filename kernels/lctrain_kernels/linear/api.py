"""Public linear functions: argument checks and autocast."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from lctrain_kernels.autocast import autocast_dtype
from lctrain_kernels.checks import require_tensors
from lctrain_kernels.linear.batch_invariant import BatchInvariantLinear
from lctrain_kernels.linear.merged import MergedLinear


def merged_linear(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """Returns `x @ weight.T` for each weight, as the projections to queries, keys and values do.

    The backward adds the gradients of x inside the matrix products. Separate linear layers add them
    afterwards, with one more read and write of all hidden states per layer. Under autocast the
    arguments are cast to autocast's dtype, as in torch.nn.functional.linear. Inside torch.compile
    the function computes separate linear layers, whose additions Inductor fuses.

    Args:
        x: Hidden states [..., E], floating point.
        weights: Weights [N_i, E] of the layers, in the dtype of x.

    Returns:
        One tensor [..., N_i] per weight, in the dtype of x.

    Raises:
        ValueError: if shapes or dtypes do not fit.
    """
    if not weights:
        raise ValueError("weights must not be empty. Pass one weight per linear layer.")
    require_tensors(x=x, **{f"weights[{i}]": weight for i, weight in enumerate(weights)})
    x, *cast = _cast(x, *weights)
    for weight in cast:
        _check(x, weight)
    if torch.compiler.is_compiling():
        return tuple(linear(x, weight) for weight in cast)
    outs = MergedLinear.apply(x.reshape(-1, x.shape[-1]), *cast)
    return tuple(out.view(*x.shape[:-1], out.shape[-1]) for out in outs)


def linear_add(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """Returns `residual + x @ weight.T`, added inside the matrix product.

    Under autocast all arguments are cast to autocast's dtype.

    Args:
        x: Hidden states [..., I], floating point.
        weight: Weight of the linear layer, [E, I], in the dtype of x.
        residual: Residual stream [..., E], in the dtype of x.

    Returns:
        The sum [..., E], in the dtype of x.

    Raises:
        ValueError: if shapes or dtypes do not fit.
    """
    require_tensors(x=x, weight=weight, residual=residual)
    x, weight, residual = _cast(x, weight, residual)
    _check(x, weight)
    shape = (*x.shape[:-1], weight.shape[0])
    if residual.shape != shape or residual.dtype != x.dtype:
        raise ValueError(
            f"residual must be {x.dtype} of shape {shape}, got {residual.dtype} of shape "
            f"{tuple(residual.shape)}. Pass the tensor that the output is added to."
        )
    rows = residual.reshape(-1, shape[-1])
    return torch.addmm(rows, x.reshape(-1, x.shape[-1]), weight.t()).view(shape)


@torch._disable_dynamo
def batch_invariant_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """Returns `x @ weight.T + bias`; the bits of a row depend on this row and the weight only.

    A row has the same bits alone, in any batch and at any position. So a model can give a token the
    same bits in a decode step and in a training forward. One Triton kernel sums every row in one
    order; on a CPU, every row is a product of its own. The gradients are those of
    torch.nn.functional.linear, by PyTorch's products. Under autocast the arguments are cast to
    autocast's dtype. torch.compile breaks its graph here.

    Args:
        x: Inputs [..., K], floating point.
        weight: Weight [N, K], in the dtype of x.
        bias: Bias [N] in the dtype of x, or None.
        backend: Implementation: "auto", "triton" or "pytorch".

    Returns:
        [..., N], in the dtype of x.

    Raises:
        ValueError: if shapes or dtypes do not fit, or `backend` does not serve them.
    """
    require_tensors(x=x, weight=weight)
    if bias is None:
        x, weight = _cast(x, weight)
    else:
        require_tensors(bias=bias)
        x, weight, bias = _cast(x, weight, bias)
    _check(x, weight)
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != x.dtype):
        raise ValueError(
            f"bias must be {x.dtype} of shape ({weight.shape[0]},), got {bias.dtype} of shape "
            f"{tuple(bias.shape)}. Pass the bias of the same linear layer."
        )
    rows = x.reshape(-1, x.shape[-1])
    out = BatchInvariantLinear.apply(rows, weight, bias, backend)
    return out.view(*x.shape[:-1], weight.shape[0])


def _cast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Returns the tensors, cast to autocast's dtype if autocast is on."""
    dtype = autocast_dtype(tensors[0].device.type)
    if dtype is None or tensors[0].dtype == torch.float64:
        return tensors
    return tuple(tensor.to(dtype) for tensor in tensors)


def _check(x: Tensor, weight: Tensor) -> None:
    if not x.is_floating_point() or x.dim() < 1:
        raise ValueError(
            f"x must be floating point with at least one dimension, got {x.dtype} of shape "
            f"{tuple(x.shape)}. Convert it."
        )
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1] or weight.dtype != x.dtype:
        raise ValueError(
            f"weight must be {x.dtype} of shape [N, {x.shape[-1]}], got {weight.dtype} of shape "
            f"{tuple(weight.shape)}. Pass the weight of a linear layer on x."
        )
