"""Chooses the implementation of a fused operation (norm, rotary, MLP, loss): "triton" or "pytorch".

The implementations are those that the registry lists.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from lctrain_kernels.backend import TRITON_INSTALLED, interpreting
from lctrain_kernels.registry import Refusal, refusal_of

BACKENDS = ("auto", "triton", "pytorch")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class FusedCall(NamedTuple):
    """Properties of a call that decide whether an implementation of a fused operation supports it.

    Attributes:
        device: Device of the tensors.
        dtype: Dtype of the tensors.
        columns: Number of columns of a row; 0 if no implementation has a limit.
    """

    device: torch.device
    dtype: torch.dtype
    columns: int = 0


Limit = Callable[[FusedCall], str | None]


def triton_refuses(*limits: Limit) -> Refusal:
    """Returns a function that names what a fused operation's Triton kernels do not support.

    The returned function takes a FusedCall and returns text, or None if the call is supported.

    Args:
        limits: Functions of the same kind, for limits of this operation. They are asked before the
            limits that all fused Triton kernels have.
    """

    def refuses(call: FusedCall, *_: Any) -> str | None:
        for limit in limits:
            reason = limit(call)
            if reason is not None:
                return reason
        return _refused_by_all(call)

    return refuses


def fused_backend(operation: str, call: FusedCall, backend: str = "auto") -> str:
    """Returns the implementation of a call, "triton" or "pytorch", the same for both passes.

    Args:
        operation: Name of the operation in the registry, such as "norm".
        call: Properties of the call.
        backend: "auto", "triton" or "pytorch". "auto" chooses "triton" on a GPU for calls that the
            kernels support, and "pytorch" otherwise.

    Raises:
        ValueError: if the name is unknown, or the named implementation does not support the call.
    """
    if torch.compiler.is_compiling():
        return _choose(operation, call, backend)
    if call.device.type != "cuda":  # the choice depends on TRITON_INTERPRET
        return _choose(operation, call, backend)
    key = (operation, call, backend, TRITON_INSTALLED)
    known = _CHOSEN.get(key)
    if known is None:
        known = _CHOSEN[key] = _choose(operation, call, backend)
    return known


_CHOSEN: dict[tuple[str, FusedCall, str, bool], str] = {}


def _choose(operation: str, call: FusedCall, backend: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}.")
    if backend == "pytorch":
        return backend
    if backend == "auto" and call.device.type != "cuda":  # ROCm devices carry this name too
        return "pytorch"
    reason = refusal_of(operation, "triton", call)
    if reason is None:
        return "triton"
    if backend == "auto":
        return "pytorch"
    raise ValueError(
        f"backend='triton' does not serve {reason}. Pass backend='auto', which takes PyTorch for "
        "that."
    )


def _refused_by_all(call: FusedCall) -> str | None:
    """Returns what the Triton kernels of all fused operations do not support in a call, or None."""
    if call.dtype not in _DTYPES:
        return f"{call.dtype}, but floats of at most 32 bits"
    if not TRITON_INSTALLED:
        return "a Python without the package triton"
    if call.device.type != "cuda" and not interpreting():
        return f"tensors on {call.device.type}, unless TRITON_INTERPRET=1 is set before the import"
    return None
