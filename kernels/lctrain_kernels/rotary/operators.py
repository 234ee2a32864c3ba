"""Registers the rotary embeddings as torch.library operators.

cos, sin and positions get no gradient.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lctrain_kernels.fused_backend import triton_refuses
from lctrain_kernels.fused_operator import define_autograd, define_operator
from lctrain_kernels.registry import BACKWARD, FORWARD, implementation, implements
from lctrain_kernels.rotary import reference
from lctrain_kernels.rotary.options import SCHEMA, RotaryOptions

_refuses = triton_refuses()
Pair = tuple[Tensor, Tensor]


def _rotate(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    inverse: bool,
    *rest: Any,
) -> Pair:
    """Runs the operator: returns q and k rotated by RoPE; the second is empty if k is None.

    Shapes are those of launch.rotate.
    """
    options = RotaryOptions(*rest)
    run = implementation("rotary", FORWARD, options.backend)
    return run(q, k, cos, sin, positions, inverse, options)


@implements("rotary", FORWARD, "triton", _refuses)
def _triton_rotate(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    inverse: bool,
    options: RotaryOptions,
) -> Pair:
    from lctrain_kernels.rotary import launch

    k = None if k is None else _columns(k)
    return launch.rotate(_columns(q), k, cos, sin, positions, None, None, options, inverse=inverse)


@implements("rotary", FORWARD, "pytorch")
def _pytorch_rotate(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    inverse: bool,
    options: RotaryOptions,
) -> Pair:
    turned = [
        reference.rotate(x, cos, sin, positions, None, inverse=inverse, **options.mathematics())
        for x in (q, k)
        if x is not None
    ]
    return turned[0], turned[1] if k is not None else q.new_empty(0)


def _qk_norm(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    *rest: Any,
) -> Pair:
    options = RotaryOptions(*rest)
    run = implementation("qk_norm_rotary", FORWARD, options.backend)
    return run(q, k, q_weight, k_weight, (cos, sin, positions), options)


Table = tuple[Tensor, Tensor, Tensor | None]


@implements("qk_norm_rotary", FORWARD, "triton", _refuses)
def _triton_qk_norm(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    table: Table,
    options: RotaryOptions,
) -> Pair:
    from lctrain_kernels.rotary import launch

    return launch.rotate(_columns(q), _columns(k), *table, q_weight, k_weight, options)


@implements("qk_norm_rotary", FORWARD, "pytorch")
def _pytorch_qk_norm(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    table: Table,
    options: RotaryOptions,
) -> Pair:
    return (
        reference.rotate(q, *table, q_weight, **options.mathematics()),
        reference.rotate(k, *table, k_weight, **options.mathematics()),
    )


def _qk_norm_backward(
    dq: Tensor,
    dk: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options, table = RotaryOptions(*rest), (cos, sin, positions)
    run = implementation("qk_norm_rotary", BACKWARD, options.backend)
    dq, dq_weight = run(dq, q, q_weight, table, options)
    dk, dk_weight = run(dk, k, k_weight, table, options)
    return dq, dk, dq_weight, dk_weight


@implements("qk_norm_rotary", BACKWARD, "triton", _refuses)
def _triton_norm_backward(
    dout: Tensor, x: Tensor, weight: Tensor, table: Table, options: RotaryOptions
) -> Pair:
    from lctrain_kernels.rotary import launch

    return launch.norm_rotary_bwd(_columns(dout), _columns(x), *table, weight, options)


@implements("qk_norm_rotary", BACKWARD, "pytorch")
def _pytorch_norm_backward(
    dout: Tensor, x: Tensor, weight: Tensor, table: Table, options: RotaryOptions
) -> Pair:
    return reference.norm_rotary_bwd(dout, x, *table, weight, **options.mathematics())


def _columns(x: Tensor) -> Tensor:
    """Returns the tensor with last stride 1; copies it only if needed."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _new(x: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0 if x is None else x.shape)


_TABLES = "Tensor cos, Tensor sin, Tensor? positions"
_WEIGHTS = "Tensor q, Tensor k, Tensor q_weight, Tensor k_weight"
rotary = define_operator(
    f"rotary(Tensor q, Tensor? k, {_TABLES}, bool inverse, {SCHEMA}) -> (Tensor, Tensor)",
    _rotate,
    lambda q, k, *rest: (_new(q, q), _new(k, q)),
)
qk_norm_rotary = define_operator(
    f"qk_norm_rotary({_WEIGHTS}, {_TABLES}, {SCHEMA}) -> (Tensor, Tensor)",
    _qk_norm,
    lambda q, k, *rest: (_new(q, q), _new(k, k)),
)
qk_norm_rotary_backward = define_operator(
    f"qk_norm_rotary_backward(Tensor dq, Tensor dk, {_WEIGHTS}, {_TABLES}, {SCHEMA}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _qk_norm_backward,
    lambda dq, dk, q, k, q_weight, k_weight, *rest: (
        _new(q, q),
        _new(k, k),
        _new(q_weight, q_weight),
        _new(k_weight, k_weight),
    ),
)


def _rotary_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, k, cos, sin, positions, ctx.inverse, *ctx.rest = inputs
    ctx.has_k = k is not None
    ctx.save_for_backward(cos, sin, positions)
    if k is None:
        ctx.mark_non_differentiable(output[1])


def _rotary_autograd(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Any, ...]:
    dq, dk = rotary(dq, dk if ctx.has_k else None, *ctx.saved_tensors, not ctx.inverse, *ctx.rest)
    return dq, dk if ctx.has_k else None, None, None, None, None, *(None for _ in ctx.rest)


def _qk_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.rest = inputs[7:]


def _qk_norm_autograd(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Any, ...]:
    grads = qk_norm_rotary_backward(dq, dk, *ctx.saved_tensors, *ctx.rest)
    return *grads, None, None, None, *(None for _ in ctx.rest)


define_autograd(rotary, _rotary_setup, _rotary_autograd)
define_autograd(qk_norm_rotary, _qk_norm_setup, _qk_norm_autograd)
