"""Registers an operator with torch.library: implementation, fake implementation and autograd.

`torch.library.custom_op` checks every call for aliases, which costs more host time than a small
kernel takes on the GPU. The results of the operators here are new tensors, so they need no such
check and are registered with the dispatcher directly.

In eager mode an Operation leaves out the dispatcher too: it calls the implementation, through an
autograd function if a gradient is needed. torch.compile, fake tensors, dispatch modes, functorch,
tensor subclasses and profilers see the operator.

Dynamo never traces into an implementation: after a graph break it would compile the launches of the
kernels, and some versions of torch fail at a number that varies.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo.eval_frame import get_eval_frame_callback

_LIBRARY = torch.library.Library("lctrain", "FRAGMENT")
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
_CONSTANTS = frozenset((type(None), bool, int, float, str, torch.dtype))


class Operation:
    """An operator of torch.library that leaves out the dispatcher where nothing watches it.

    Args:
        operator: The operator.
        implementation: The operator's implementation.

    Attributes:
        operator: The operator.
    """

    def __init__(self, operator: Any, implementation: Callable[..., Any]) -> None:
        self.operator = operator
        self._implementation = implementation
        self._apply: Any = None

    def __call__(self, *arguments: Any) -> Any:
        """Returns the operator's results for its arguments."""
        if torch.compiler.is_compiling() or not is_unwatched(arguments):
            return self.operator(*arguments)
        if self._apply is not None and torch.is_grad_enabled():
            for argument in arguments:
                if type(argument) in _PLAIN and argument.requires_grad:
                    return self._apply(*arguments)
        return self._implementation(*arguments)

    def differentiate(self, function: Any) -> None:
        """Sets the autograd function that calls the implementation.

        `Function.apply` looks for functorch in every argument; `is_unwatched` has done that.
        """
        self._apply = super(torch.autograd.Function, function).apply  # type: ignore[misc]


def is_unwatched(arguments: Sequence[Any]) -> bool:
    """Returns whether only eager PyTorch would see an operator called with these arguments.

    False if the operator must pass the dispatcher: while Dynamo is at work, under a dispatch or
    function mode, functorch, a tracer or a profiler, for tensor subclasses such as fake tensors,
    symbolic numbers and proxies, for views that the dispatcher would negate, and on devices other
    than CPU and GPU.
    """
    if (
        get_eval_frame_callback() is not None
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
    ):
        return False
    for argument in arguments:
        kind = type(argument)
        if kind in _PLAIN:
            if not (argument.is_cuda or argument.is_cpu) or argument.is_neg():
                return False
        elif kind not in _CONSTANTS:
            return False
    return True


def define_operator(
    schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]
) -> Operation:
    """Defines `lctrain::<schema>` for every device.

    Args:
        schema: Name, arguments and results, in torch.library's syntax, which marks arguments
            that are overwritten.
        implementation: Function that computes the results. No result may alias an argument.
        fake: Function that returns empty results with the right shapes and dtypes.

    Returns:
        The operation; `define_autograd` makes it differentiable.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, torch._disable_dynamo(implementation), "CompositeExplicitAutograd")
    torch.library.register_fake(f"lctrain::{name}", fake, lib=_LIBRARY)
    return Operation(getattr(torch.ops.lctrain, name).default, implementation)


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
    operation: Operation, setup_context: Callable[..., None], backward: Callable[..., Any]
) -> None:
    """Registers the backward of an operation.

    `torch.library.register_autograd` does the same, but takes twice the host time per call.

    Args:
        operation: Operation that define_operator returned.
        setup_context: Function of (ctx, inputs, output) that saves tensors for the backward, as in
            torch.autograd.Function.
        backward: Function of (ctx, *gradients of the results) that returns the gradients of the
            inputs. Differentiating it again is an error of torch.
    """
    operator = operation.operator
    name = operator.name().partition("::")[2]
    backward = first_derivative_only(backward)

    def below_autograd(*arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    def function_of(compute: Callable[..., Any]) -> Any:
        def forward(ctx: Any, *arguments: Any) -> Any:
            output = compute(*arguments)
            setup_context(ctx, arguments, output)
            return output

        # A Function with a setup_context of its own would inspect forward's signature per call.
        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        return type(name, (torch.autograd.Function,), methods)

    dispatched = function_of(below_autograd)

    def autograd(*arguments: Any) -> Any:
        if torch.is_grad_enabled() and any(
            isinstance(argument, torch.Tensor) and argument.requires_grad for argument in arguments
        ):
            return dispatched.apply(*arguments)
        return below_autograd(*arguments)

    _LIBRARY.impl(name, torch._disable_dynamo(autograd), "Autograd")
    operation.differentiate(function_of(operation._implementation))
