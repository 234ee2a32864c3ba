"""Reports which kernels (Hopper, portable, PyTorch) run an operation, as text and as tables."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lctrain_kernels.differential import operators as differential
from lctrain_kernels.dual_chunk import operands as dual_chunk
from lctrain_kernels.fused_backend import FusedCall, fused_backend
from lctrain_kernels.options import AttentionOptions
from lctrain_kernels.registry import BACKWARD, FORWARD, choose, refusals
from lctrain_kernels.varlen import operators as varlen

HEAD_DIMS = (64, 128, 256)
FUSED = ("norm", "rotary", "qk_norm_rotary", "gated", "bias_gelu", "linear_cross_entropy")
"""Fused operations of the registry; "gated" serves swiglu, geglu and gated_linear."""


def serving(
    operation: str,
    head_dim: int,
    dtype: torch.dtype,
    *,
    deterministic: bool = False,
    value_dim: int | None = None,
    shared_k: bool = False,
) -> str:
    """Names the backend of a model's attention, and of its backward if that differs.

    The text starts with "hopper" if the Hopper kernels run the forward. Otherwise it names the
    backend that runs, and in brackets the reason.

    Args:
        operation: "varlen", "dual_chunk" or "differential".
        head_dim: Head dim of queries and keys.
        dtype: Dtype of queries, keys and values.
        deterministic: Whether the backward must give the same bits in every run.
        value_dim: Head dim of the values; head_dim by default.
        shared_k: Whether both branches of differential attention read one k.
    """
    operands = shapes(operation, head_dim, dtype, value_dim=value_dim, shared_k=shared_k)
    options = AttentionOptions(head_dim**-0.5, deterministic=deterministic, backend="hopper")
    forward, backward = (
        refusals(operation, direction, operands, options)["hopper"]
        for direction in (FORWARD, BACKWARD)
    )
    other = choose(operation, BACKWARD, operands, options).backend
    if forward is not None:
        return f"{other} (not hopper: {forward})"
    return "hopper" if backward is None else f"hopper, and {other} for {backward}"


def shapes(
    operation: str,
    head_dim: int,
    dtype: torch.dtype,
    *,
    value_dim: int | None = None,
    shared_k: bool = False,
) -> Any:
    """Returns meta tensors with the shapes of an attention call of one token and one head.

    The result is the Operands of the operation; the arguments have the meanings of those of
    `serving`.
    """
    x = torch.empty(1, 1, head_dim, dtype=dtype, device="meta")
    v = torch.empty(1, 1, value_dim or head_dim, dtype=dtype, device="meta")
    if operation == "differential":
        lam = torch.empty(1, 1, device="meta")
        return differential.Operands(x, x, x, None if shared_k else x, v, lam)
    if operation == "dual_chunk":
        inv_freq = torch.empty(head_dim // 2, device="meta")
        return dual_chunk.Operands(x, x, v, inv_freq, None, 2, 1)
    return varlen.Operands(x, x, v)


def support_matrix() -> list[tuple[str, str, str, str]]:
    """Returns the table of attention calls and the backends that serve them on a Hopper GPU.

    A row is (operation, kind of call, backend of the forward, backend of the backward).
    """
    return [
        (operation, name, *_backends(operation, head_dim, options))
        for operation in ("varlen", "dual_chunk", "differential")
        for name, head_dim, options in _calls(operation)
    ]


def fused_matrix() -> list[tuple[str, ...]]:
    """Returns the table of fused operations and the backends that backend="auto" chooses on a GPU.

    A row is (operation, backend for half precision, for float32, for float64). Forward and backward
    have the same backend.
    """
    calls = [*((operation, operation, 0) for operation in FUSED)]
    calls.append(("norm of 65,536 columns", "norm", 65536))
    dtypes, device = (torch.bfloat16, torch.float32, torch.float64), torch.device("cuda")
    return [
        (name, *(fused_backend(operation, FusedCall(device, x, columns)) for x in dtypes))
        for name, operation, columns in calls
    ]


def _calls(operation: str) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Yields (name, head dim, options) of each kind of call that support_matrix lists."""
    yield from ((f"D = {head_dim}", head_dim, {}) for head_dim in HEAD_DIMS)
    yield "D = 128, dropout", 128, {"dropout_p": 0.1}
    yield from (
        (f"D = {head_dim}, deterministic", head_dim, {"deterministic": True})
        for head_dim in HEAD_DIMS[:2]
    )
    if operation == "varlen":
        yield "D = 128, ALiBi", 128, {"alibi_slopes": _slopes()}


def _slopes() -> Tensor:
    return torch.empty(1, device="meta")


def _backends(operation: str, head_dim: int, options: dict[str, Any]) -> tuple[str, str]:
    call = AttentionOptions(head_dim**-0.5, backend="hopper", **options)
    operands = shapes(operation, head_dim, torch.bfloat16)
    forward, backward = (
        choose(operation, direction, operands, call).backend for direction in (FORWARD, BACKWARD)
    )
    return forward, backward
