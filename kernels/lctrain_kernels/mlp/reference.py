"""SwiGLU, GeGLU and bias + GELU in plain PyTorch: the reference of the tests, and the CPU path."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")


def activate(x: Tensor, activation: str) -> Tensor:
    """Returns activation(x), in the dtype of x."""
    if activation == "silu":
        return functional.silu(x)
    return functional.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def slope(x: Tensor, activation: str) -> Tensor:
    """Returns the derivative of the activation at x, in the dtype of x."""
    if activation == "silu":
        share = x.sigmoid()
        return share * (1.0 + x * (-x).sigmoid())
    if activation == "gelu_tanh":
        factor = 2.0 * math.sqrt(2.0 / math.pi)
        square = x * x
        double = x * (factor + factor * 0.044715 * square)
        steep = factor + 3.0 * factor * 0.044715 * square
        return double.sigmoid() * (1.0 + x * steep * (-double).sigmoid())
    share = 0.5 + 0.5 * torch.erf(x * math.sqrt(0.5))
    return share + x * torch.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi)


def gated_fwd(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Returns activation(gate) * up, in the shape of gate."""
    return activate(gate, activation) * up


def gated_bwd(
    dout: Tensor, gate: Tensor, up: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of gate and up, and activation(gate) * up, computed in float32.

    dout is the gradient of activation(gate) * up. All tensors have one shape.
    """
    wide = torch.promote_types(gate.dtype, torch.float32)
    dout, wide_gate, wide_up = dout.to(wide), gate.to(wide), up.to(wide)
    active = activate(wide_gate, activation)
    dgate = dout * wide_up * slope(wide_gate, activation)
    out = active.to(gate.dtype) * up
    return dgate.to(gate.dtype), (dout * active).to(up.dtype), out


def bias_gelu_fwd(x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """Returns activation(x + bias), in the shape and dtype of x; bias is [I] or None."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return activate(wide if bias is None else wide + bias, activation).to(x.dtype)


def bias_gelu_bwd(
    dout: Tensor, x: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of x [T, I] and of the bias [I]; the second is empty without a bias.

    dout [T, I] is the gradient of activation(x + bias).
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    dx = dout.to(wide.dtype) * slope(wide if bias is None else wide + bias, activation)
    dbias = x.new_empty(0) if bias is None else dx.sum(0).to(bias.dtype)
    return dx.to(x.dtype), dbias
