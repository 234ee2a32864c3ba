"""Registers RMSNorm and LayerNorm as torch.library operators."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from lctrain_kernels.fused_backend import FusedCall, triton_refuses
from lctrain_kernels.fused_operator import define_autograd, define_operator
from lctrain_kernels.norm import reference
from lctrain_kernels.norm.config import MAX_COLUMNS
from lctrain_kernels.norm.options import NormOptions
from lctrain_kernels.registry import BACKWARD, FORWARD, implementation, implements

_OPTIONS = "float eps, float weight_offset, bool float32_product, bool centered, str backend"


def sum_dtype(x: Tensor, residual: Tensor | None) -> torch.dtype:
    """Returns the dtype of x + residual, or of x if there is no residual."""
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)


def _many_columns(call: FusedCall) -> str | None:
    return f"rows of more than {MAX_COLUMNS} columns" if call.columns > MAX_COLUMNS else None


_refuses = triton_refuses(_many_columns)
Forward = tuple[Tensor, Tensor, Tensor, Tensor]
Backward = tuple[Tensor, Tensor, Tensor]


def _norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, *rest: Any
) -> Forward:
    """Runs the forward operator: normalises the rows of x [..., H], or of x + residual.

    Autograd would record each reshaping outside the operator, which costs more host time than one
    inside.

    Returns:
        The results of launch.norm_fwd: normalised rows, sum x + residual (empty without a
        residual), mean and 1 / standard deviation. The first two have the shape of x.
    """
    run = implementation("norm", FORWARD, rest[-1])
    y, total, mean, rstd = run(x, residual, weight, bias, _norm_options(*rest[:-1]))
    if y.dim() != x.dim():
        y, total = like(y, x), total if residual is None else like(total, x)
    return y, total, mean, rstd


_unsafe_view = torch.ops.aten._unsafe_view.default
_norm_options = functools.lru_cache(maxsize=64)(NormOptions)


def flat_rows(x: Tensor) -> Tensor:
    """Returns a tensor [..., H] as rows [T, H]."""
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def rows_of(tensor: Tensor) -> Tensor:
    """Returns a tensor [..., H] in a form that the kernels read; copies if needed.

    That is [T, H] with column stride 1, or [..., H] in contiguous memory, whose rows are
    stride(-2) elements apart. A dimension of size 1 may have any stride: [1, S, H] transposed is
    contiguous, and its stride(-2) is S * H.
    """
    if tensor.dim() > 1 and tensor.stride(-2) == tensor.shape[-1] and tensor.is_contiguous():
        return tensor
    flat = flat_rows(tensor)
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def like(rows: Tensor, x: Tensor) -> Tensor:
    """Returns a new tensor [T, H] in the shape of x [..., H]; autograd sees no view in it."""
    return rows if rows.dim() == x.dim() else _unsafe_view(rows, x.shape)


@implements("norm", FORWARD, "triton", _refuses)
def _triton_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, options: NormOptions
) -> Forward:
    from lctrain_kernels.norm import launch

    residual = None if residual is None else rows_of(residual)
    return launch.norm_fwd(rows_of(x), residual, weight, bias, options)


@implements("norm", FORWARD, "pytorch")
def _pytorch_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, options: NormOptions
) -> Forward:
    total = x.new_empty(0)
    if residual is not None:
        x = total = x + residual
    x = flat_rows(x)
    y, mean, rstd = reference.norm_fwd(x, weight, bias, **vars(options))
    return y, total, mean, rstd


def _norm_fake(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, *rest: Any
) -> Forward:
    options = NormOptions(*rest[:-1])
    rows, dtype = math.prod(x.shape[:-1]), sum_dtype(x, residual)
    total = x.new_empty(0 if residual is None else x.shape, dtype=dtype)
    statistics = torch.promote_types(dtype, torch.float32)
    return (
        x.new_empty(x.shape, dtype=options.out_dtype(dtype, weight.dtype)),
        total,
        x.new_empty(rows if options.centered else 0, dtype=statistics),
        x.new_empty(rows, dtype=statistics),
    )


def _norm_backward(*arguments: Any) -> Backward:
    """Runs the backward operator: gradients of x [..., H], weight [H] and bias [H].

    The last two are empty tensors if not needed.
    """
    dy, dsum, x, weight, mean, rstd, needs_weight, needs_bias = arguments[:8]
    run = implementation("norm", BACKWARD, arguments[-1])
    options = _norm_options(*arguments[8:-1])
    dx, dweight, dbias = run(dy, dsum, x, weight, mean, rstd, options, needs_weight, needs_bias)
    return like(dx, x), dweight, dbias


@implements("norm", BACKWARD, "triton", _refuses)
def _triton_backward(dy: Tensor, dsum: Tensor | None, x: Tensor, *rest: Any) -> Backward:
    from lctrain_kernels.norm import launch

    dsum = None if dsum is None else rows_of(dsum)
    return launch.norm_bwd(rows_of(dy), dsum, rows_of(x), *rest)


@implements("norm", BACKWARD, "pytorch")
def _pytorch_backward(
    dy: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    options: NormOptions,
    needs_weight: bool,
    needs_bias: bool,
) -> Backward:
    return reference.norm_bwd(
        flat_rows(dy),
        None if dsum is None else flat_rows(dsum),
        flat_rows(x),
        weight,
        mean,
        rstd,
        weight_offset=options.weight_offset,
        centered=options.centered,
        needs_weight=needs_weight,
        needs_bias=needs_bias,
    )


def _norm_backward_fake(
    dy: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    needs_weight: bool,
    needs_bias: bool,
    *rest: Any,
) -> Backward:
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape if needs_weight else 0),
        weight.new_empty(weight.shape if needs_bias else 0),
    )


norm = define_operator(
    f"norm(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _norm,
    _norm_fake,
)
norm_backward = define_operator(
    "norm_backward(Tensor dy, Tensor? dsum, Tensor x, Tensor weight, Tensor mean, Tensor rstd, "
    f"bool needs_weight, bool needs_bias, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    _norm_backward,
    _norm_backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, _, *ctx.rest = inputs
    _, total, mean, rstd = output
    ctx.has_residual = residual is not None
    ctx.dtypes = (x.dtype, residual.dtype if ctx.has_residual else None)
    ctx.save_for_backward(total if ctx.has_residual else x, weight, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd, *(() if ctx.has_residual else (total,)))
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, dsum: Tensor | None, *unused: Any) -> tuple[Any, ...]:
    x, weight, mean, rstd = ctx.saved_tensors
    needs = ctx.needs_input_grad
    dsum = dsum if ctx.has_residual else None
    dweight = dbias = None
    dx = dsum
    if dy is not None:  # else only the sum was used
        dx, dweight, dbias = norm_backward(
            dy, dsum, x, weight, mean, rstd, needs[2], needs[3], *ctx.rest
        )
    dtype, residual_dtype = ctx.dtypes
    return (
        _cast(dx, dtype) if needs[0] else None,
        _cast(dx, residual_dtype) if needs[1] else None,
        dweight if needs[2] else None,
        dbias if needs[3] else None,
        *_NO_GRADIENTS,
    )


def _cast(dx: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    return dx if dx is None or dx.dtype == dtype else dx.to(dtype)


_NO_GRADIENTS = (None,) * 5  # of the options and the backend
define_autograd(norm, _setup_context, _backward)
