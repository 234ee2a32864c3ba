"""RMSNorm that also returns its input, for use as the residual.

The backward then adds both gradients of the input in the norm's kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lctrain_kernels.fused_operator import first_derivative_only
from lctrain_kernels.norm.operators import norm, norm_backward


class NormAndInput(torch.autograd.Function):
    """Autograd function that returns the RMSNorm of x, and x itself.

    An operator of torch.library must not return its argument, so this is an autograd function.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        """Returns the normalised rows and a view of x, both [T, H].

        `options` are the arguments of the operator `norm` after the bias.
        """
        y, _, mean, rstd = norm(x, None, weight, None, *options)
        ctx.options = options
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.set_materialize_grads(False)
        return y, x.view_as(x)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dy: Tensor | None, dpassed: Tensor | None) -> tuple[Any, ...]:
        """Returns the gradients of x and weight; dpassed is the gradient of the returned x."""
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        dx, dweight = dpassed, None
        if dy is not None:
            dx, dweight, _ = norm_backward(
                dy, dpassed, *ctx.saved_tensors, needs_weight, False, *ctx.options
            )
        return (
            dx if needs_x else None,
            dweight if needs_weight else None,
            *(None for _ in ctx.options),
        )
