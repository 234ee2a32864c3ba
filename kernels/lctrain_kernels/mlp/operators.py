"""Registers SwiGLU, GeGLU, gated_linear and bias + GELU as torch.library operators.

Only the inputs are saved for the backward, not the product activation(gate) * up. `gated_linear`
includes the linear layer that follows the product. The gradient of its weight needs the product,
which the backward kernel recomputes while it computes the gradients of gate and up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lctrain_kernels.fused_backend import triton_refuses
from lctrain_kernels.fused_operator import define_autograd, define_operator
from lctrain_kernels.mlp import reference
from lctrain_kernels.norm.operators import flat_rows, like, rows_of
from lctrain_kernels.registry import BACKWARD, FORWARD, implementation, implements

_refuses = triton_refuses()


@implements("gated", FORWARD, "triton", _refuses)
def _triton_gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    from lctrain_kernels.mlp import launch

    return launch.gated_fwd(gate, up, activation)


@implements("gated", BACKWARD, "triton", _refuses)
def _triton_gated_backward(dout: Tensor, *arguments: Any) -> None:
    from lctrain_kernels.mlp import launch

    launch.gated_bwd(_rows(dout), *arguments)


@implements("gated", BACKWARD, "pytorch")
def _pytorch_gated_backward(
    dout: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str,
    dgate: Tensor,
    dup: Tensor,
    out: Tensor | None = None,
) -> None:
    """Writes the gradients to dgate and dup, and activation(gate) * up to out.

    out may be dout itself, or None to skip it.
    """
    results = reference.gated_bwd(dout, gate, up, activation)
    for target, result in zip((dgate, dup, out), results, strict=True):
        if target is not None:
            target.copy_(result)


@implements("bias_gelu", FORWARD, "triton", _refuses)
def _triton_bias_gelu(x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    from lctrain_kernels.mlp import launch

    return launch.bias_gelu_fwd(rows_of(x), bias, activation)


@implements("bias_gelu", BACKWARD, "triton", _refuses)
def _triton_bias_gelu_backward(
    dout: Tensor, x: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    from lctrain_kernels.mlp import launch

    return launch.bias_gelu_bwd(rows_of(dout), rows_of(x), bias, activation)


implements("gated", FORWARD, "pytorch")(reference.gated_fwd)
implements("bias_gelu", FORWARD, "pytorch")(reference.bias_gelu_fwd)


@implements("bias_gelu", BACKWARD, "pytorch")
def _pytorch_bias_gelu_backward(
    dout: Tensor, x: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    return reference.bias_gelu_bwd(flat_rows(dout), flat_rows(x), bias, activation)


def _gated(gate: Tensor, up: Tensor, activation: str, backend: str) -> Tensor:
    return implementation("gated", FORWARD, backend)(gate, up, activation)


def _gated_backward(
    dout: Tensor, gate: Tensor, up: Tensor, activation: str, backend: str
) -> tuple[Tensor, Tensor]:
    dgate, dup = _contiguous(gate), _contiguous(up)
    implementation("gated", BACKWARD, backend)(dout, gate, up, activation, dgate, dup)
    return dgate, dup


def _gated_packed_backward(dout: Tensor, packed: Tensor, activation: str, backend: str) -> Tensor:
    """Returns the gradient [T, 2 I] of `packed`, which holds gate and up side by side."""
    gate, up = packed.chunk(2, dim=-1)
    grad = _contiguous(packed)
    halves = grad.chunk(2, dim=-1)
    implementation("gated", BACKWARD, backend)(dout, gate, up, activation, *halves)
    return grad


def _gated_linear(
    gate: Tensor, up: Tensor, weight: Tensor, residual: Tensor | None, activation: str, backend: str
) -> Tensor:
    active = _gated(gate, up, activation, backend)
    return active @ weight.t() if residual is None else torch.addmm(residual, active, weight.t())


def _gated_linear_backward(
    dy: Tensor,
    gate: Tensor,
    up: Tensor,
    weight: Tensor,
    needs_weight: bool,
    activation: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dout = dy @ weight  # [T, I]
    dgate, dup = _contiguous(gate), _contiguous(up)
    out = dout if needs_weight else None  # the recomputed product overwrites its gradient
    implementation("gated", BACKWARD, backend)(dout, gate, up, activation, dgate, dup, out)
    return dgate, dup, weight.new_empty(0) if out is None else dy.t() @ out


def _bias_gelu(x: Tensor, bias: Tensor | None, activation: str, backend: str) -> Tensor:
    """Returns activation(x + bias), [..., I]."""
    return like(implementation("bias_gelu", FORWARD, backend)(x, bias, activation), x)


def _bias_gelu_backward(
    dout: Tensor, x: Tensor, bias: Tensor | None, activation: str, backend: str
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of x [..., I] and of the bias [I], which is empty without a bias."""
    dx, dbias = implementation("bias_gelu", BACKWARD, backend)(dout, x, bias, activation)
    return like(dx, x), dbias


def _contiguous(x: Tensor) -> Tensor:
    """Returns an uninitialised contiguous tensor with the shape, dtype and device of x."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _rows(tensor: Tensor) -> Tensor:
    """Returns the tensor with last stride 1; copies it only if needed."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _new(tensor: Tensor) -> Tensor:
    return tensor.new_empty(tensor.shape)


gated = define_operator(
    "gated(Tensor gate, Tensor up, str activation, str backend) -> Tensor",
    _gated,
    lambda gate, up, *rest: _new(gate),
)
gated_backward = define_operator(
    "gated_backward(Tensor dout, Tensor gate, Tensor up, str activation, str backend) "
    "-> (Tensor, Tensor)",
    _gated_backward,
    lambda dout, gate, up, *rest: (_new(gate), _new(up)),
)
gated_packed = define_operator(
    "gated_packed(Tensor packed, str activation, str backend) -> Tensor",
    lambda packed, *rest: _gated(*packed.chunk(2, dim=-1), *rest),
    lambda packed, *rest: packed.new_empty(packed.shape[0], packed.shape[1] // 2),
)
gated_packed_backward = define_operator(
    "gated_packed_backward(Tensor dout, Tensor packed, str activation, str backend) -> Tensor",
    _gated_packed_backward,
    lambda dout, packed, *rest: _new(packed),
)
gated_linear = define_operator(
    "gated_linear(Tensor gate, Tensor up, Tensor weight, Tensor? residual, str activation, "
    "str backend) -> Tensor",
    _gated_linear,
    lambda gate, up, weight, *rest: gate.new_empty(gate.shape[0], weight.shape[0]),
)
gated_linear_backward = define_operator(
    "gated_linear_backward(Tensor dy, Tensor gate, Tensor up, Tensor weight, bool needs_weight, "
    "str activation, str backend) -> (Tensor, Tensor, Tensor)",
    _gated_linear_backward,
    lambda dy, gate, up, weight, needs_weight, *rest: (
        _new(gate),
        _new(up),
        weight.new_empty(weight.shape if needs_weight else 0),
    ),
)
bias_activation = define_operator(
    "bias_gelu(Tensor x, Tensor? bias, str activation, str backend) -> Tensor",
    _bias_gelu,
    lambda x, *rest: _new(x),
)
bias_activation_backward = define_operator(
    "bias_gelu_backward(Tensor dout, Tensor x, Tensor? bias, str activation, str backend) "
    "-> (Tensor, Tensor)",
    _bias_gelu_backward,
    lambda dout, x, bias, *rest: (_new(x), x.new_empty(0) if bias is None else _new(bias)),
)


def _save(number: int) -> Any:
    """Returns a setup_context that saves an operator's first `number` arguments for the backward.

    The arguments after them become `ctx.rest`, with None in place of a tensor.
    """

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:number])
        ctx.rest = [None if isinstance(i, Tensor) else i for i in inputs[number:]]

    return setup


def _gated_autograd(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    return *gated_backward(dout, *ctx.saved_tensors, *ctx.rest), None, None


def _gated_packed_autograd(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    return gated_packed_backward(dout, *ctx.saved_tensors, *ctx.rest), None, None


def _gated_linear_autograd(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    needs, needs_residual = ctx.needs_input_grad[2:4]
    dgate, dup, dweight = gated_linear_backward(dy, *ctx.saved_tensors, needs, *ctx.rest[1:])
    return dgate, dup, dweight if needs else None, dy if needs_residual else None, None, None


def _bias_gelu_autograd(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    dx, dbias = bias_activation_backward(dout, *ctx.saved_tensors, *ctx.rest)
    return dx, dbias if ctx.needs_input_grad[1] else None, None, None


define_autograd(gated, _save(2), _gated_autograd)
define_autograd(gated_packed, _save(1), _gated_packed_autograd)
define_autograd(gated_linear, _save(3), _gated_linear_autograd)
define_autograd(bias_activation, _save(2), _bias_gelu_autograd)
