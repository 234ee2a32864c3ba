"""The autograd function of merged_linear: several linear layers with one input.

The backward adds the layers' gradients of the input inside the matrix products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lctrain_kernels.fused_operator import first_derivative_only


class MergedLinear(torch.autograd.Function):
    """Computes `x @ weight.T` for each weight; `merged_linear` checks and reshapes the arguments.

    The products are PyTorch's own, so FLOP counters and selective checkpoints see them.
    """

    @staticmethod
    def forward(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        """Returns one tensor [T, N_i] per weight [N_i, E], for x [T, E]."""
        return tuple(x @ weight.t() for weight in weights)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        """Saves x if a weight needs a gradient, and the weights if x needs one."""
        x, *weights = inputs
        needs_x, *needs = ctx.needs_input_grad
        ctx.save_for_backward(x if any(needs) else None, *(weights if needs_x else ()))
        ctx.set_materialize_grads(False)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *douts: Tensor | None) -> tuple[Tensor | None, ...]:
        """Returns the gradients of x and of each weight; None for those that are not needed."""
        x, *weights = ctx.saved_tensors
        dx: Tensor | None = None
        for dout, weight in zip(douts, weights, strict=False):
            if dout is not None:
                dx = dout @ weight if dx is None else dx.addmm_(dout, weight)
        needs = ctx.needs_input_grad[1:]
        dweights = (
            dout.t() @ x if needed and dout is not None else None
            for dout, needed in zip(douts, needs, strict=True)
        )
        return dx, *dweights
