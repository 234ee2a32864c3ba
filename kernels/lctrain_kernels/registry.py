"""The implementations of every pass of every operation, and the calls that they refuse."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

FORWARD, BACKWARD = "forward", "backward"
# What a resolved backend tries, best first. A call that Hopper's kernels refuse goes to Triton's.
PREFERENCES = {
    "hopper": ("hopper", "triton"),
    "triton": ("triton",),
    "pytorch": ("pytorch",),
}
Refusal = Callable[..., str | None]
Run = Callable[..., tuple[Tensor, ...]]


class Implementation(NamedTuple):
    """One implementation of one pass of an operation.

    Attributes:
        backend: "hopper", "triton" or "pytorch".
        refuses: Function from a call's operands, options and gradient of out to what the
            implementation does not support, or None.
        run: Computes the pass.
    """

    backend: str
    refuses: Refusal
    run: Run


_IMPLEMENTATIONS: dict[tuple[str, str], dict[str, Implementation]] = {}


def serves_all(*_: Any) -> None:
    """Refuses no call."""


def implements(
    operation: str, direction: str, backend: str, refuses: Refusal = serves_all
) -> Callable[[Run], Run]:
    """Registers the decorated function as an implementation.

    Args:
        operation: Name of the operation, such as "varlen".
        direction: FORWARD or BACKWARD.
        backend: "hopper", "triton" or "pytorch".
        refuses: See Implementation.
    """

    def register(run: Run) -> Run:
        known = _IMPLEMENTATIONS.setdefault((operation, direction), {})
        known[backend] = Implementation(backend, refuses, run)
        return run

    return register


def refusals(
    operation: str, direction: str, operands: Any, options: Any, dout: Tensor | None = None
) -> dict[str, str | None]:
    """Returns for each implementation of a pass why it does not serve a call; None if it does."""
    found = _IMPLEMENTATIONS[operation, direction]
    return {name: one.refuses(operands, options, dout) for name, one in found.items()}


def choose(
    operation: str, direction: str, operands: Any, options: Any, dout: Tensor | None = None
) -> Implementation:
    """Returns the first implementation that options.backend prefers and that serves a call."""
    found = _IMPLEMENTATIONS[operation, direction]
    candidates = [found[name] for name in PREFERENCES[options.backend] if name in found]
    return next(one for one in candidates if one.refuses(operands, options, dout) is None)


def require_backend(operation: str, operands: Any, options: Any, trained: Iterable[Tensor]) -> None:
    """Refuses a call that a backend which the caller named does not serve.

    Args:
        operation: Name of the operation, such as "varlen".
        operands: Operands of the call.
        options: Options of the call; options.backend is the named one.
        trained: Tensors that may need a gradient. If one does, the backward must be served, too.

    Raises:
        ValueError: if the implementation refuses the call.
    """
    needs_backward = torch.is_grad_enabled() and any(x.requires_grad for x in trained)
    direction = BACKWARD if needs_backward else FORWARD
    reason = refusals(operation, direction, operands, options)[options.backend]
    if reason is not None:
        raise ValueError(
            f"backend={options.backend!r} does not serve {reason}. Pass backend='auto', which "
            "takes the portable kernels for that, or backend='triton'."
        )
