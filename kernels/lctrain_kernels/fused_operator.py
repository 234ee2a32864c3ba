"""Registers an operator with torch.library: implementation, fake implementation and autograd.

`torch.library.custom_op` checks every call for aliases, which costs more host time than a small
kernel takes on the GPU. The operators here return new tensors only, so they need no such check and
are registered with the dispatcher directly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

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
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lctrain::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.lctrain, name).default


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
            inputs.
    """

    def forward(*arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    function: Any = type(
        operator.name().partition("::")[2],
        (torch.autograd.Function,),
        {
            "forward": staticmethod(forward),
            "setup_context": staticmethod(setup_context),
            "backward": staticmethod(backward),
        },
    )

    def autograd(*arguments: Any) -> Any:
        if torch.is_grad_enabled() and any(
            isinstance(argument, torch.Tensor) and argument.requires_grad for argument in arguments
        ):
            return function.apply(*arguments)
        return forward(*arguments)

    _LIBRARY.impl(operator.name().partition("::")[2], autograd, "Autograd")
