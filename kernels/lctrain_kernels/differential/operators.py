"""lctrain::differential_forward and differential_backward: the operators behind the public
function."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lctrain_kernels.differential import reference
from lctrain_kernels.schedule import complete_schedule
from lctrain_kernels.varlen.operators import attended_pairs, reference_options
from lctrain_kernels.varlen.reference import VarlenOptions


@torch.library.custom_op("lctrain::differential_forward", mutates_args=())
def differential_forward(
    q1: Tensor,
    q2: Tensor,
    k1: Tensor,
    k2: Tensor | None,
    v: Tensor,
    lam: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    q_tiles: Tensor | None,
    k_tiles: Tensor | None,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    window: Tensor | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
    document_ids: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns out, out1 = A1 v, out2 = A2 v [T, H, Dv], lse1 and lse2 [H, T].

    lam is [T, H], k2 is None if it is k1; other arguments are as the public function resolved them.
    """
    if backend == "pytorch":
        with torch.autocast(q1.device.type, enabled=False):
            return reference.differential_forward(
                q1,
                q2,
                k1,
                k2,
                v,
                lam,
                cu_seqlens_q,
                cu_seqlens_k,
                _options(softmax_scale, window_left, window_right, window, dropout_p),
                dropout_seed=dropout_seed,
                document_ids=document_ids,
            )
    schedule = complete_schedule(
        q_tiles, k_tiles, cu_seqlens_q, cu_seqlens_k, q1.shape[0], k1.shape[0]
    )
    from lctrain_kernels.differential.triton_fwd import differential_fwd

    if backend == "hopper":
        from lctrain_kernels.differential import hopper as differential
        from lctrain_kernels.gluon import support

        call = support.DifferentialCall(q1, q2, k1, k2, v)
        if support.refusal(call, support.DIFFERENTIAL_FORWARD_LIMITS) is None:
            differential_fwd = differential.differential_fwd
    return differential_fwd(
        q1,
        q2,
        k1,
        k2,
        v,
        lam,
        cu_seqlens_q,
        cu_seqlens_k,
        schedule.q_tiles,
        softmax_scale=softmax_scale,
        window=(window_left, window_right) if window is None else window,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        document_ids=document_ids,
    )


@differential_forward.register_fake
def _(
    q1: Tensor, q2: Tensor, k1: Tensor, k2: Tensor | None, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    lse_dtype = torch.promote_types(q1.dtype, torch.float32)
    shape, lse_shape = (q1.shape[0], q1.shape[1], v.shape[2]), (q1.shape[1], q1.shape[0])
    return (
        q1.new_empty(shape),
        q1.new_empty(shape),
        q1.new_empty(shape),
        q1.new_empty(lse_shape, dtype=lse_dtype),
        q1.new_empty(lse_shape, dtype=lse_dtype),
    )


@torch.library.custom_op("lctrain::differential_backward", mutates_args=())
def differential_backward(
    dout: Tensor,
    dlse1: Tensor | None,
    dlse2: Tensor | None,
    q1: Tensor,
    q2: Tensor,
    k1: Tensor,
    k2: Tensor | None,
    v: Tensor,
    lam: Tensor,
    out1: Tensor,
    out2: Tensor,
    lse1: Tensor,
    lse2: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    q_tiles: Tensor | None,
    k_tiles: Tensor | None,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    window: Tensor | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
    document_ids: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns dq1, dq2, dk1, dk2, dv in the shapes of q1, q2, k1, k2, v, and dlam [H, T].

    Where k2 is None, dk1 is the sum of both branches and dk2 is empty.
    """
    if backend == "pytorch":
        with torch.autocast(q1.device.type, enabled=False):
            return reference.differential_backward(
                dout,
                dlse1,
                dlse2,
                q1,
                q2,
                k1,
                k2,
                v,
                lam,
                out2,
                lse1,
                lse2,
                cu_seqlens_q,
                cu_seqlens_k,
                _options(softmax_scale, window_left, window_right, window, dropout_p),
                dropout_seed=dropout_seed,
                document_ids=document_ids,
            )
    schedule = complete_schedule(
        q_tiles, k_tiles, cu_seqlens_q, cu_seqlens_k, q1.shape[0], k1.shape[0]
    )
    operands = (dout, dlse1, dlse2, q1, q2, k1, k2, v, lam, out1, out2, lse1, lse2)
    boundaries = (cu_seqlens_q, cu_seqlens_k)
    options: dict[str, Any] = {
        "softmax_scale": softmax_scale,
        "window": (window_left, window_right) if window is None else window,
    }
    if backend == "hopper":
        from lctrain_kernels.differential import hopper as differential
        from lctrain_kernels.gluon import support

        deterministic = torch.are_deterministic_algorithms_enabled()
        call = support.DifferentialCall(q1, q2, k1, k2, v, dout, deterministic, dropout_p > 0)
        if support.refusal(call, support.DIFFERENTIAL_BACKWARD_LIMITS) is None:
            return differential.differential_bwd(
                *operands, *boundaries, schedule.k_tiles, **options
            )
    from lctrain_kernels.differential.triton_bwd import differential_bwd

    return differential_bwd(
        *operands,
        *boundaries,
        schedule.q_tiles,
        schedule.k_tiles,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        document_ids=document_ids,
        **options,
    )


@differential_backward.register_fake
def _(
    dout: Tensor,
    dlse1: Tensor | None,
    dlse2: Tensor | None,
    q1: Tensor,
    q2: Tensor,
    k1: Tensor,
    k2: Tensor | None,
    v: Tensor,
    lam: Tensor,
    out1: Tensor,
    out2: Tensor,
    lse1: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        q1.new_empty(q1.shape),
        q1.new_empty(q1.shape),
        q1.new_empty(k1.shape),
        q1.new_empty(0 if k2 is None else k1.shape),
        q1.new_empty(v.shape),
        torch.empty_like(lse1),
    )


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
) -> None:
    tensors, scale, left, right, window, p = inputs[:10], *inputs[10:15]
    seed, document_ids, backend = inputs[15:]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:3])  # out1 and out2 are kept for the backward
    ctx.save_for_backward(*tensors, window, seed, document_ids, *output[1:])
    ctx.scalars = (scale, left, right, p, backend)


def _backward(
    ctx: Any,
    dout: Tensor | None,
    _dout1: Tensor | None,
    _dout2: Tensor | None,
    dlse1: Tensor | None,
    dlse2: Tensor | None,
) -> tuple[Tensor | None, ...]:
    q1, q2, k1, k2, v, lam, *metadata = ctx.saved_tensors
    *metadata, window, seed, document_ids, out1, out2, lse1, lse2 = metadata
    scale, left, right, p, backend = ctx.scalars
    dq1, dq2, dk1, dk2, dv, dlam = torch.ops.lctrain.differential_backward(
        torch.zeros_like(out1) if dout is None else dout,
        dlse1,
        dlse2,
        q1,
        q2,
        k1,
        k2,
        v,
        lam,
        out1,
        out2,
        lse1,
        lse2,
        *metadata,
        scale,
        left,
        right,
        window,
        p,
        seed,
        document_ids,
        backend,
    )
    return (dq1, dq2, dk1, None if k2 is None else dk2, dv, dlam.t(), *[None] * 12)


differential_forward.register_autograd(_backward, setup_context=_setup_context)


def _options(
    softmax_scale: float,
    window_left: int,
    window_right: int,
    window: Tensor | None,
    dropout_p: float,
) -> VarlenOptions:
    return reference_options(softmax_scale, window_left, window_right, window, 0.0, dropout_p)


@register_flop_formula(torch.ops.lctrain.differential_forward, get_raw=True)
def differential_forward_flops(
    q1: Tensor,
    q2: Tensor,
    k1: Tensor,
    k2: Tensor | None,
    v: Tensor,
    lam: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    q_tiles: Tensor | None,
    k_tiles: Tensor | None,
    scale: float,
    left: int,
    right: int,
    window: Tensor | None,
    *args: Any,
    out_val: Any = None,
) -> int:
    """Two products of D and two of Dv over the visible pairs."""
    pairs = attended_pairs(cu_q, cu_k, left, right, window, q1, k1)
    return 2 * pairs * q1.shape[1] * (2 * q1.shape[2] + 2 * v.shape[2])


@register_flop_formula(torch.ops.lctrain.differential_backward, get_raw=True)
def differential_backward_flops(
    dout: Tensor,
    dlse1: Tensor | None,
    dlse2: Tensor | None,
    q1: Tensor,
    q2: Tensor,
    k1: Tensor,
    k2: Tensor | None,
    v: Tensor,
    lam: Tensor,
    out1: Tensor,
    out2: Tensor,
    lse1: Tensor,
    lse2: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    q_tiles: Tensor | None,
    k_tiles: Tensor | None,
    scale: float,
    left: int,
    right: int,
    window: Tensor | None,
    *args: Any,
    out_val: Any = None,
) -> int:
    """Six products of D and two of Dv over the visible pairs, however the kernels compute them."""
    pairs = attended_pairs(cu_q, cu_k, left, right, window, q1, k1)
    return 2 * pairs * q1.shape[1] * (6 * q1.shape[2] + 2 * v.shape[2])
