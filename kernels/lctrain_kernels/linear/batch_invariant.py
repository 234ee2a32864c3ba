"""batch_invariant_linear: a linear layer whose bits of a row do not depend on the other rows.

cuBLAS and the libraries of CPUs choose a kernel, and with it an order of sums, by the number of
rows. Here the order depends on the weight only. The gradients are PyTorch's own products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from lctrain_kernels.fused_backend import FusedCall, fused_backend, triton_refuses
from lctrain_kernels.fused_operator import first_derivative_only
from lctrain_kernels.linear.by_row import by_row
from lctrain_kernels.registry import FORWARD, implementation, implements

OPERATION = "batch_invariant_linear"


@implements(OPERATION, FORWARD, "triton", triton_refuses())
def _triton(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    from lctrain_kernels.linear.launch import linear_into

    linear_into(x, weight, bias, out)


@implements(OPERATION, FORWARD, "pytorch")
def _pytorch(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    weight = weight.to(torch.promote_types(out.dtype, weight.dtype))
    bias = None if bias is None else bias.to(weight.dtype)
    out.copy_(by_row(lambda row: linear(row.to(weight.dtype), weight, bias), x))


def product_into(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, backend: str = "auto"
) -> None:
    """Computes out = x @ weight.T + bias, with bits of a row that depend on no other row.

    Args:
        x: Inputs [T, K].
        weight: Weight [N, K], in the dtype of x.
        bias: Bias [N], or None.
        out: Result [T, N], any dtype; its columns are contiguous.
        backend: Implementation: "auto", "triton" or "pytorch".
    """
    chosen = fused_backend(OPERATION, FusedCall(x.device, x.dtype), backend)
    implementation(OPERATION, FORWARD, chosen)(x, weight, bias, out)


class BatchInvariantLinear(torch.autograd.Function):
    """`x @ weight.T + bias` of checked arguments: x [T, K], weight [N, K], bias [N] or None."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
        """Returns [T, N] in the dtype of x."""
        out = x.new_empty(x.shape[0], weight.shape[0])
        with torch.autocast(x.device.type, enabled=False):
            product_into(x, weight, bias, out, backend)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Saves x if the weight needs a gradient, and the weight if x needs one."""
        x, weight, _, _ = inputs
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients of x, weight and bias; None for those that are not needed."""
        x, weight = ctx.saved_tensors
        dx = None if weight is None else dout @ weight
        dweight = None if x is None else dout.t() @ x
        dbias = dout.sum(0) if ctx.needs_input_grad[2] else None
        return dx, dweight, dbias, None
