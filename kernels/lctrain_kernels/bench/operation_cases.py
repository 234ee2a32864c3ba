"""The fused operations that `lctrain-bench ops` times, and the same operations of other libraries.

A contender gets the leaves of its case and returns its outputs in the layout of lctrain's function.
Every contender has leaves of its own, since Liger's rotary embedding writes into its inputs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import lctrain_kernels as ours

OURS, LIGER, QUACK, COMPILED, EAGER = "lctrain", "liger", "quack", "compile", "torch"
TITLES = {
    OURS: "lctrain",
    LIGER: "Liger-Kernel",
    QUACK: "QuACK",
    COMPILED: "torch.compile",
    EAGER: "PyTorch",
}
DISTRIBUTIONS = {LIGER: "liger-kernel", QUACK: "quack-kernels"}
EPS = 1e-6
Leaves = Sequence[Tensor]
Function = Callable[..., Any]


@dataclass(frozen=True)
class OperationCase:
    """A fused operation over rows, with the contenders that are timed on it.

    The leaves are the tensors that get a gradient: inputs, then weights.

    Attributes:
        name: Name on the command line, in `--operations`.
        columns: Widths of a row that are timed.
        shapes: Function from (rows, columns) to the shapes of the leaves, those of weights last.
        main: Number of leaves that are inputs. The bytes of weights are not counted.
        forward_moves: Bytes that a forward reads and writes, in units of the mean size of an input.
        backward_moves: Bytes that a backward reads and writes, in the same unit.
        contenders: Name -> function that returns the outputs from leaves and constants.
        constants: Function from the leaves to further arguments without gradients.
    """

    name: str
    columns: tuple[int, ...]
    shapes: Callable[[int, int], list[tuple[int, ...]]]
    main: int
    forward_moves: float
    backward_moves: float
    contenders: Mapping[str, Function]
    constants: Callable[[Leaves], Sequence[Tensor]] = lambda leaves: ()

    def leaves(self, rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Leaves:
        """Draws the leaves: standard normal, the same numbers on every call."""
        generator = torch.Generator(device).manual_seed(0)
        return [
            torch.randn(shape, generator=generator, device=device, dtype=dtype).requires_grad_()
            for shape in self.shapes(rows, columns)
        ]

    def moved_bytes(self, leaves: Leaves) -> tuple[float, float]:
        """Returns the bytes that a forward and a backward must read and write at least."""
        size = sum(leaf.numel() * leaf.element_size() for leaf in leaves[: self.main]) / self.main
        return self.forward_moves * size, self.backward_moves * size


def _rows(rows: int, columns: int) -> list[tuple[int, ...]]:
    return [(rows, columns), (columns,)]


def _two_rows(rows: int, columns: int) -> list[tuple[int, ...]]:
    return [(rows, columns), (rows, columns), (columns,)]


def _gates(rows: int, columns: int) -> list[tuple[int, ...]]:
    return [(rows, columns), (rows, columns)]


def _layer_norm(rows: int, columns: int) -> list[tuple[int, ...]]:
    return [(rows, columns), (columns,), (columns,)]


HEADS_KV, WIDE_HEAD = 8, 128


def _heads(rows: int, columns: int) -> list[tuple[int, ...]]:
    """Returns the shapes of queries [1, T, Hq, D] and keys [1, T, Hk, D].

    D is 64 for 2,048 columns.
    """
    dim = 64 if columns == 2048 else min(WIDE_HEAD, columns // 2)
    return [(1, rows, columns // dim, dim), (1, rows, min(HEADS_KV, columns // dim), dim)]


def _normed_heads(rows: int, columns: int) -> list[tuple[int, ...]]:
    dim = min(WIDE_HEAD, columns // 2)
    heads = columns // dim
    return [(1, rows, heads, dim), (1, rows, min(HEADS_KV, heads), dim), (dim,), (dim,)]


def _rotation(leaves: Leaves) -> Sequence[Tensor]:
    """Returns cos and sin, [1, T, D] each, in the layout of transformers."""
    q = leaves[0]
    frequencies = 1e6 ** (-torch.arange(0, q.shape[-1], 2, device=q.device) / q.shape[-1])
    cos, sin = ours.rotary_table(frequencies, torch.arange(q.shape[1], device=q.device))
    return [torch.cat([table, table], dim=-1)[None].to(q.dtype) for table in (cos, sin)]


def _liger(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"liger_kernel.ops.{module}"), name)


def _quack(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"quack.{module}"), name)


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, EPS)


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return _rms_norm(total, weight), total


def _normed(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), weight, bias, EPS)


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        other = torch.cat((-second, first), dim=-1)
        return x * cos[:, :, None] + other * sin[:, :, None]

    return turned(q), turned(k)


def _norm_rotate(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    return _rotate(_rms_norm(q, q_weight), _rms_norm(k, k_weight), cos, sin)


def _liger_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return _liger("rms_norm", "LigerRMSNormFunction").apply(x, weight, EPS, 0.0, "llama", False)


def _liger_rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    rope = _liger("rope", "LigerRopeFunction")
    q, k = rope.apply(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    return q.transpose(1, 2), k.transpose(1, 2)


def _liger_norm_rotate(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    return _liger_rotate(_liger_rms_norm(q, q_weight), _liger_rms_norm(k, k_weight), cos, sin)


def _quack_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return _quack("rmsnorm", "rmsnorm")(x, weight, eps=EPS)


def _quack_rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    rotate = _quack("rotary", "apply_rotary_emb")
    half = cos.shape[-1] // 2
    tables = cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()
    return rotate(q, *tables), rotate(k, *tables)


_NORM_WIDTHS = (2048, 4096, 8192)
_GATE_WIDTHS = (8192, 14336)
_ALL = (
    OperationCase(
        "rms_norm",
        *(_NORM_WIDTHS, _rows, 1, 2, 3),
        {
            OURS: lambda x, w: ours.rms_norm(x, w, EPS),
            LIGER: _liger_rms_norm,
            QUACK: _quack_rms_norm,
            COMPILED: _rms_norm,
            EAGER: _rms_norm,
        },
    ),
    OperationCase(
        "add_rms_norm",
        *(_NORM_WIDTHS, _two_rows, 2, 4, 4),  # one gradient serves both addends
        {
            OURS: lambda x, r, w: ours.fused_add_rms_norm(x, r, w, EPS),
            LIGER: lambda x, r, w: _liger(
                "fused_add_rms_norm", "LigerFusedAddRMSNormFunction"
            ).apply(x, r, w, EPS, 0.0, "llama", False),
            QUACK: lambda x, r, w: _quack("rmsnorm", "rmsnorm")(
                x, w, residual=r, eps=EPS, prenorm=True
            ),
            COMPILED: _add_rms_norm,
            EAGER: _add_rms_norm,
        },
    ),
    OperationCase(
        "layer_norm",
        *(_NORM_WIDTHS, _layer_norm, 1, 2, 3),
        {
            OURS: lambda x, w, b: ours.layer_norm(x, w, b, EPS),
            LIGER: lambda x, w, b: _liger("layer_norm", "LigerLayerNormFunction").apply(
                x, w, b, EPS
            ),
            COMPILED: _normed,
            EAGER: _normed,
        },
    ),
    OperationCase(
        "rotary",
        *(_NORM_WIDTHS, _heads, 2, 4, 4),
        {
            OURS: ours.rotate_qk,
            LIGER: _liger_rotate,
            QUACK: _quack_rotate,
            COMPILED: _rotate,
            EAGER: _rotate,
        },
        _rotation,
    ),
    OperationCase(
        "qk_norm_rotary",
        *(_NORM_WIDTHS, _normed_heads, 2, 4, 6),
        {
            OURS: lambda q, k, wq, wk, cos, sin: ours.qk_norm_rotary(q, k, wq, wk, cos, sin, EPS),
            LIGER: _liger_norm_rotate,
            COMPILED: _norm_rotate,
            EAGER: _norm_rotate,
        },
        _rotation,
    ),
    OperationCase(
        "swiglu",
        *(_GATE_WIDTHS, _gates, 2, 3, 5),
        {
            OURS: ours.swiglu,
            LIGER: lambda gate, up: _liger("swiglu", "LigerSiLUMulFunction").apply(gate, up),
            COMPILED: lambda gate, up: F.silu(gate) * up,
            EAGER: lambda gate, up: F.silu(gate) * up,
        },
    ),
    OperationCase(
        "geglu",
        *(_GATE_WIDTHS, _gates, 2, 3, 5),
        {
            OURS: ours.geglu,
            LIGER: lambda gate, up: _liger("geglu", "LigerGELUMulFunction").apply(gate, up),
            COMPILED: lambda gate, up: F.gelu(gate, approximate="tanh") * up,
            EAGER: lambda gate, up: F.gelu(gate, approximate="tanh") * up,
        },
    ),
    OperationCase(
        "bias_gelu",
        *(_GATE_WIDTHS, _rows, 1, 2, 3),
        {
            OURS: ours.bias_gelu,
            COMPILED: lambda x, bias: F.gelu(x + bias),
            EAGER: lambda x, bias: F.gelu(x + bias),
        },
    ),
)
CASES = {case.name: case for case in _ALL}
