"""Registers the implementations of each operation's forward and backward, and chooses one."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

FORWARD, BACKWARD = "forward", "backward"
# Backend -> implementations that are tried, in this order.
PREFERENCES = {
    "hopper": ("hopper", "triton"),
    "triton": ("triton",),
    "pytorch": ("pytorch",),
}
Refusal = Callable[..., str | None]
Run = Callable[..., Any]


class Implementation(NamedTuple):
    """One implementation of the forward or the backward of an operation.

    Attributes:
        backend: Implementation: "hopper", "triton" or "pytorch".
        refuses: Function that names the first property of the call that the implementation does
            not support; None if it supports all. It takes (operands, options, gradient of out) of
            an attention, and a FusedCall of a fused operation.
        run: Function that computes the forward or backward.
        overwrites: Function from (operands, pack, options) of an attention to the names of operands
            over which a backward can write their gradients, once each program has read its part.
            `run` then takes the tensors to write to as a last argument.
    """

    backend: str
    refuses: Refusal
    run: Run
    overwrites: Callable[..., frozenset[str]]


_IMPLEMENTATIONS: dict[tuple[str, str], dict[str, Implementation]] = {}


def serves_all(*_: Any) -> None:
    """Returns None for any call: the `refuses` of an implementation that supports every call."""


def overwrites_nothing(*_: Any) -> frozenset[str]:
    """Returns no names: the `overwrites` of an implementation that returns new tensors."""
    return frozenset()


def implements(
    operation: str,
    direction: str,
    backend: str,
    refuses: Refusal = serves_all,
    overwrites: Callable[..., frozenset[str]] = overwrites_nothing,
) -> Callable[[Run], Run]:
    """Returns a decorator that registers a function as an implementation.

    Args:
        operation: Name of the operation, such as "varlen".
        direction: FORWARD or BACKWARD.
        backend: Implementation: "hopper", "triton" or "pytorch".
        refuses: Function that names an unsupported property of a call; see Implementation.
        overwrites: Function that names operands that a backward can overwrite; see Implementation.
    """

    def register(run: Run) -> Run:
        known = _IMPLEMENTATIONS.setdefault((operation, direction), {})
        known[backend] = Implementation(backend, refuses, run, overwrites)
        return run

    return register


def refusals(
    operation: str, direction: str, operands: Any, options: Any, dout: Tensor | None = None
) -> dict[str, str | None]:
    """Returns, for each backend, a property of the call that it does not support; None without one.

    Args:
        operation: Name of the operation, such as "varlen".
        direction: FORWARD or BACKWARD.
        operands: Tensor inputs of the call; a FusedCall for a fused operation.
        options: Options of the call.
        dout: Gradient of out in a backward; None in a forward.
    """
    found = _IMPLEMENTATIONS[operation, direction]
    return {name: one.refuses(operands, options, dout) for name, one in found.items()}


def implementation(operation: str, direction: str, backend: str) -> Run:
    """Returns the function of a backend that computes an operation's forward or backward."""
    return _IMPLEMENTATIONS[operation, direction][backend].run


def refusal_of(operation: str, backend: str, *call: Any) -> str | None:
    """Returns what a backend does not support in the forward or the backward of a call, or None."""
    asked = None
    for direction in (FORWARD, BACKWARD):
        found = _IMPLEMENTATIONS.get((operation, direction), {}).get(backend)
        if found is None or found.refuses is asked:
            continue
        asked = found.refuses
        reason = asked(*call)
        if reason is not None:
            return reason
    return None


def choose(
    operation: str, direction: str, operands: Any, options: Any, dout: Tensor | None = None
) -> Implementation:
    """Returns the first implementation that supports a call, in the order of PREFERENCES.

    The arguments are those of refusals.
    """
    found = _IMPLEMENTATIONS[operation, direction]
    for name in PREFERENCES[options.backend]:
        one = found.get(name)
        if one is not None and one.refuses(operands, options, dout) is None:
            return one
    raise ValueError(f"no implementation of {operation} serves backend={options.backend!r}.")


def require_backend(operation: str, operands: Any, options: Any, trained: Iterable[Tensor]) -> None:
    """Raises unless the backend that the caller named supports the call.

    Args:
        operation: Name of the operation, such as "varlen".
        operands: Operands of the call.
        options: Options of the call; options.backend is the backend that the caller named.
        trained: Tensors that may need a gradient. If one does, the backward is checked, else the
            forward.

    Raises:
        ValueError: if the backend does not support the call.
    """
    needs_backward = torch.is_grad_enabled() and any(x.requires_grad for x in trained)
    direction = BACKWARD if needs_backward else FORWARD
    reason = refusals(operation, direction, operands, options)[options.backend]
    if reason is not None:
        raise ValueError(
            f"backend={options.backend!r} does not serve {reason}. Pass backend='auto', which "
            "takes the portable kernels for that, or backend='triton'."
        )
