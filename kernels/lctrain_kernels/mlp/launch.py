"""Launches the Triton kernels of the activations. The functions match those of `reference`."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from lctrain_kernels.mlp.triton_kernels import (
    bias_gelu_bwd_kernel,
    bias_gelu_fwd_kernel,
    gated_bwd_kernel,
    gated_fwd_kernel,
)
from lctrain_kernels.norm.launch import column_sum

ACTIVATION_NUMBERS = {"silu": 0, "gelu_tanh": 1, "gelu": 2}
FORWARD_BLOCK, BACKWARD_BLOCK, NUM_WARPS = 1024, 1024, 4
BIAS_ROWS, BIAS_BLOCK, BIAS_PARTS = 16, 256, 64


def _grid(rows: int, columns: int, block: int) -> tuple[int]:
    return (rows * triton.cdiv(columns, block),)


def gated_fwd(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Returns activation(gate) * up, [T, I], in gate's dtype.

    gate and up are [T, I] with any row stride and column stride 1.
    """
    rows, columns = gate.shape
    out = torch.empty(rows, columns, dtype=gate.dtype, device=gate.device)
    if out.numel():
        gated_fwd_kernel[_grid(rows, columns, FORWARD_BLOCK)](
            gate,
            up,
            out,
            columns,
            gate.stride(0),
            up.stride(0),
            columns,
            BLOCK=FORWARD_BLOCK,
            ACTIVATION=ACTIVATION_NUMBERS[activation],
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
    return out


def gated_bwd(
    dout: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str,
    dgate: Tensor,
    dup: Tensor,
    out: Tensor | None = None,
) -> None:
    """Writes the gradients of gate and up, and optionally recomputes activation(gate) * up.

    Args:
        dout: Gradient of activation(gate) * up, [T, I].
        gate: Gate [T, I].
        up: Factor of the activated gate, [T, I].
        activation: Name of the activation, a key of ACTIVATION_NUMBERS.
        dgate: Buffer for the gradient of gate, [T, I]; written.
        dup: Buffer for the gradient of up, [T, I]; written.
        out: Buffer for activation(gate) * up, [T, I] with the strides of dout, or None. It may be
            dout itself.
    """
    rows, columns = gate.shape
    if not gate.numel():
        return
    gated_bwd_kernel[_grid(rows, columns, BACKWARD_BLOCK)](
        dout,
        gate,
        up,
        dgate,
        dup,
        out,
        columns,
        dout.stride(0),
        gate.stride(0),
        up.stride(0),
        dgate.stride(0),
        dup.stride(0),
        BLOCK=BACKWARD_BLOCK,
        ACTIVATION=ACTIVATION_NUMBERS[activation],
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )


def bias_gelu_fwd(x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """Returns activation(x + bias), [T, I], for x [T, I] and bias [I] or None."""
    rows, columns = x.shape
    out = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    if out.numel():
        bias_gelu_fwd_kernel[_grid(rows, columns, FORWARD_BLOCK)](
            x,
            bias,
            out,
            columns,
            x.stride(0),
            BLOCK=FORWARD_BLOCK,
            ACTIVATION=ACTIVATION_NUMBERS[activation],
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
    return out


def bias_gelu_bwd(
    dout: Tensor, x: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of x [T, I] and of the bias [I]; the second is empty without a bias.

    dout [T, I] is the gradient of activation(x + bias).
    """
    rows, columns = x.shape
    dx = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    parts = min(triton.cdiv(rows, BIAS_ROWS), BIAS_PARTS)
    dbias = torch.zeros(max(parts, 1), columns, dtype=torch.float32, device=x.device)
    if parts and columns:
        bias_gelu_bwd_kernel[(parts, triton.cdiv(columns, BIAS_BLOCK))](
            dout,
            x,
            bias,
            dx,
            None if bias is None else dbias,
            rows,
            columns,
            dout.stride(0),
            x.stride(0),
            ROWS=BIAS_ROWS,
            BLOCK=BIAS_BLOCK,
            ACTIVATION=ACTIVATION_NUMBERS[activation],
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
    return dx, x.new_empty(0) if bias is None else column_sum(dbias, bias.dtype)
