"""Launches the Triton kernels of the activations. The functions match those of `reference`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lctrain_kernels.launch import cdiv, launch
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
    return (rows * cdiv(columns, block),)


def gated_fwd(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Returns activation(gate) * up, [T, I], in gate's dtype.

    gate and up are [T, I] with any row stride and column stride 1.
    """
    rows, columns = gate.shape
    out = torch.empty(rows, columns, dtype=gate.dtype, device=gate.device)
    if out.numel():
        launch(gated_fwd_kernel, _grid(rows, columns, FORWARD_BLOCK))(
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
    launch(gated_bwd_kernel, _grid(rows, columns, BACKWARD_BLOCK))(
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
    """Returns activation(x + bias), in the shape of x, for a bias [I] or None.

    x is [T, I] with column stride 1, or [..., I] in contiguous memory.
    """
    columns = x.shape[-1]
    rows = math.prod(x.shape[:-1])
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        launch(bias_gelu_fwd_kernel, _grid(rows, columns, FORWARD_BLOCK))(
            x,
            bias,
            out,
            columns,
            x.stride(-2),
            BLOCK=FORWARD_BLOCK,
            ACTIVATION=ACTIVATION_NUMBERS[activation],
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
    return out


def bias_gelu_bwd(
    dout: Tensor, x: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of x and of the bias [I]; the second is empty without a bias.

    x and dout, the gradient of activation(x + bias), are [T, I] with column stride 1, or [..., I]
    in contiguous memory.
    """
    columns = x.shape[-1]
    rows = math.prod(x.shape[:-1])
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    parts = min(cdiv(rows, BIAS_ROWS), BIAS_PARTS)
    empty = torch.empty if parts else torch.zeros  # with rows, every part is written
    dbias = empty(max(parts, 1), columns, dtype=torch.float32, device=x.device)
    if parts and columns:
        launch(bias_gelu_bwd_kernel, (parts, cdiv(columns, BIAS_BLOCK)))(
            dout,
            x,
            bias,
            dx,
            None if bias is None else dbias,
            rows,
            columns,
            dout.stride(-2),
            x.stride(-2),
            ROWS=BIAS_ROWS,
            BLOCK=BIAS_BLOCK,
            ACTIVATION=ACTIVATION_NUMBERS[activation],
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
    return dx, x.new_empty(0) if bias is None else column_sum(dbias, bias.dtype)
