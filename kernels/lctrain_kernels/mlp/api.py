"""Public activation functions: argument checks, reshaping and the choice of backend."""

from __future__ import annotations

import torch
from torch import Tensor

from lctrain_kernels.autocast import autocast_dtype
from lctrain_kernels.checks import require_tensors
from lctrain_kernels.fused_backend import FusedCall, fused_backend
from lctrain_kernels.mlp import operators
from lctrain_kernels.mlp.reference import ACTIVATIONS


def swiglu(gate: Tensor, up: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """Returns `silu(gate) * up`; gate and up are saved for the backward, not the product.

    Args:
        gate: Gate [..., I], floating point. If `up` is None, gate and up side by side, [..., 2 I].
        up: Factor of the activated gate, [..., I], or None.
        backend: Implementation: "auto", "triton" or "pytorch".

    Returns:
        The product [..., I], in the dtype of gate.

    Raises:
        ValueError: if shapes or dtypes do not fit.
    """
    return _gated(gate, up, "silu", backend)


def geglu(
    gate: Tensor, up: Tensor | None = None, *, approximate: str = "tanh", backend: str = "auto"
) -> Tensor:
    """Returns `gelu(gate) * up`; gate and up are saved for the backward, not the product.

    Args:
        gate: Gate [..., I], floating point. If `up` is None, gate and up side by side, [..., 2 I].
        up: Factor of the activated gate, [..., I], or None.
        approximate: "tanh" or "none", as in torch.nn.functional.gelu.
        backend: Implementation: "auto", "triton" or "pytorch".

    Returns:
        The product [..., I], in the dtype of gate.

    Raises:
        ValueError: if shapes or dtypes do not fit, or `approximate` is unknown.
    """
    return _gated(gate, up, _gelu(approximate), backend)


def gated_linear(
    gate: Tensor,
    up: Tensor,
    weight: Tensor,
    *,
    activation: str = "silu",
    residual: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Returns `(activation(gate) * up) @ weight.T`, plus the residual if there is one.

    The backward recomputes `activation(gate) * up` instead of saving it. Under autocast the
    arguments are cast to autocast's dtype, as in torch.nn.functional.linear.

    Args:
        gate: Gate [..., I].
        up: Factor of the activated gate, [..., I].
        weight: Weight of the linear layer, [E, I].
        activation: "silu", "gelu_tanh" or "gelu".
        residual: Residual stream [..., E] in the dtype of gate, which the product adds; or None.
        backend: Implementation: "auto", "triton" or "pytorch".

    Returns:
        The output of the linear layer, [..., E].

    Raises:
        ValueError: if shapes or dtypes do not fit.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}.")
    require_tensors(gate=gate, up=up, weight=weight)
    dtype = autocast_dtype(gate.device.type)
    if dtype is not None and gate.dtype != torch.float64:
        gate, up, weight = gate.to(dtype), up.to(dtype), weight.to(dtype)
        residual = None if residual is None else residual.to(dtype)
    _check(gate, up)
    if weight.dim() != 2 or weight.shape[1] != gate.shape[-1] or weight.dtype != gate.dtype:
        raise ValueError(
            f"weight must be {gate.dtype} of shape [E, {gate.shape[-1]}], got {weight.dtype} of "
            f"shape {tuple(weight.shape)}. Pass the weight of the projection after the product."
        )
    columns, shape = gate.shape[-1], (*gate.shape[:-1], weight.shape[0])
    if residual is not None and (residual.shape != shape or residual.dtype != gate.dtype):
        raise ValueError(
            f"residual must be {gate.dtype} of shape {shape}, got {residual.dtype} of shape "
            f"{tuple(residual.shape)}. Pass the tensor that the output is added to."
        )
    chosen = fused_backend("gated", FusedCall(gate.device, gate.dtype), backend)
    out = operators.gated_linear(
        _flat(gate, columns),
        _flat(up, columns),
        weight,
        None if residual is None else _flat(residual, shape[-1]),
        activation,
        chosen,
    )
    return out.view(shape)


def bias_gelu(
    x: Tensor, bias: Tensor | None = None, *, approximate: str = "none", backend: str = "auto"
) -> Tensor:
    """Returns `gelu(x + bias)`, computed in float32; x and bias are saved for the backward.

    Args:
        x: Input [..., I], floating point.
        bias: Bias [I], or None.
        approximate: "none" or "tanh", as in torch.nn.functional.gelu.
        backend: Implementation: "auto", "triton" or "pytorch".

    Returns:
        The activated input [..., I], in the dtype of x.

    Raises:
        ValueError: if shapes or dtypes do not fit, or `approximate` is unknown.
    """
    activation = _gelu(approximate)
    require_tensors(x=x)
    if not x.is_floating_point() or x.dim() < 1:
        raise ValueError(f"x must be floating point, got {x.dtype}. Convert it.")
    if bias is not None and bias.shape != x.shape[-1:]:
        raise ValueError(
            f"bias must have shape ({x.shape[-1]},), got {tuple(bias.shape)}. "
            "Pass one value per column of x."
        )
    chosen = fused_backend("bias_gelu", FusedCall(x.device, x.dtype), backend)
    return operators.bias_activation(x, bias, activation, chosen)


def _gated(gate: Tensor, up: Tensor | None, activation: str, backend: str) -> Tensor:
    require_tensors(gate=gate, up=gate if up is None else up)
    chosen = fused_backend("gated", FusedCall(gate.device, gate.dtype), backend)
    if up is None:
        if gate.dim() < 1 or gate.shape[-1] % 2 or not gate.is_floating_point():
            raise ValueError(
                f"gate without up must hold both, floating point [..., 2 I], got {gate.dtype} of "
                f"shape {tuple(gate.shape)}. Pass up as well."
            )
        out = operators.gated_packed(_flat(gate, gate.shape[-1]), activation, chosen)
        return out.view(*gate.shape[:-1], gate.shape[-1] // 2)
    _check(gate, up)
    columns = gate.shape[-1]
    out = operators.gated(_flat(gate, columns), _flat(up, columns), activation, chosen)
    return out.view(gate.shape)


def _flat(tensor: Tensor, columns: int) -> Tensor:
    flat = tensor.reshape(-1, columns)
    return flat if flat.stride(1) == 1 or columns == 1 else flat.contiguous()


def _check(gate: Tensor, up: Tensor) -> None:
    if gate.shape != up.shape or gate.dtype != up.dtype or not gate.is_floating_point():
        raise ValueError(
            "gate and up must be floating point of one shape and dtype, got "
            f"{tuple(gate.shape)} {gate.dtype} and {tuple(up.shape)} {up.dtype}. Convert one."
        )


def _gelu(approximate: str) -> str:
    if approximate not in ("tanh", "none"):
        raise ValueError(f"approximate must be 'tanh' or 'none', got {approximate!r}.")
    return "gelu_tanh" if approximate == "tanh" else "gelu"
