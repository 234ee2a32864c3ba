"""Registers an operator with torch.library: implementation, fake implementation and autograd.

`torch.library.custom_op` checks every call for aliases, which costs more host time than a small
kernel takes on the GPU. The operators here return new tensors only, so they need no such check and
are registered with the dispatcher directly.

Dynamo never traces into an implementation: after a graph break it would compile the launches of the
kernels, and some versions of torch fail at a number that varies.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("lctrain", "FRAGMENT")


def define_operator(
    schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Defines `lctrain::<schema>` for every device.

    Args:
        schema: Name, arguments and results, in torch.library's syntax. No argument is mutated.
        implementation: Function that computes the results. No result may alias an argument.
        fake: Function that returns empty results with the right shapes and dtypes.

    Returns:
        The operator.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, torch._disable_dynamo(implementation), "CompositeExplicitAutograd")
    torch.library.register_fake(f"lctrain::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.lctrain, name).default


class _NoSecondDerivative(torch.autograd.Function):
    """Autograd function that returns a backward's results; differentiating them is an error."""

    @staticmethod
    def forward(ctx: Any, results: list[Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        raise RuntimeError(
            "lctrain's operations have no second derivative. Patch the model with fused=False and "
            "loss=False, and use PyTorch's attention."
        )


class _Context:
    """Context of an autograd function whose saved tensors are unpacked once.

    Checkpointing refuses to unpack them twice.
    """

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx
        self.saved_tensors = ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def first_derivative_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a backward whose gradients cannot be differentiated again.

    `torch.autograd.function.once_differentiable` loses the graph from the gradients to the
    parameters, so that torch.autograd.grad returns None for them, without an error.

    Args:
        backward: Function of (ctx, *gradients of the results) that returns the gradients of the
            inputs.
    """

    @functools.wraps(backward)
    def first(ctx: Any, *gradients: Tensor | None) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *gradients)
        ctx = _Context(ctx)
        with torch.no_grad():
            found = backward(ctx, *gradients)
        found = found if isinstance(found, tuple) else (found,)
        inputs = [x for x in (*gradients, *ctx.saved_tensors) if x is not None and x.requires_grad]
        results = [x for x in found if x is not None]
        outs = iter(_NoSecondDerivative.apply(results, *inputs))
        return tuple(None if x is None else next(outs) for x in found)

    return first


def define_autograd(
    operator: Any, setup_context: Callable[..., None], backward: Callable[..., Any]
) -> None:
    """Registers the backward of an operator.

    `torch.library.register_autograd` does the same, but takes twice the host time per call.

    Args:
        operator: Operator that define_operator returned.
        setup_context: Function of (ctx, inputs, output) that saves tensors for the backward, as in
            torch.autograd.Function.
        backward: Function of (ctx, *gradients of the results) that returns the gradients of the
            inputs. Differentiating it again is an error of torch.
    """

    def forward(*arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    def forward_and_save(ctx: Any, *arguments: Any) -> Any:
        output = forward(*arguments)
        setup_context(ctx, arguments, output)
        return output

    # A Function with a setup_context of its own would inspect the signature of forward per call.
    function: Any = type(
        operator.name().partition("::")[2],
        (torch.autograd.Function,),
        {
            "forward": staticmethod(forward_and_save),
            "backward": staticmethod(first_derivative_only(backward)),
        },
    )

    def autograd(*arguments: Any) -> Any:
        if torch.is_grad_enabled() and any(
            isinstance(argument, torch.Tensor) and argument.requires_grad for argument in arguments
        ):
            return function.apply(*arguments)
        return forward(*arguments)

    _LIBRARY.impl(operator.name().partition("::")[2], torch._disable_dynamo(autograd), "Autograd")
