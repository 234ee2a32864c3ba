"""lctrain::dual_chunk_forward and dual_chunk_backward: the operators behind the public function."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lctrain_kernels.dual_chunk import reference
from lctrain_kernels.schedule import complete_schedule
from lctrain_kernels.varlen.operators import causal_pairs
from lctrain_kernels.varlen.reference import VarlenOptions


@torch.library.custom_op("lctrain::dual_chunk_forward", mutates_args=())
def dual_chunk_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    q_tiles: Tensor | None,
    k_tiles: Tensor | None,
    inv_freq: Tensor,
    logit_scale: Tensor | None,
    chunk_size: int,
    local_size: int,
    softmax_scale: float,
    dropout_p: float,
    dropout_seed: Tensor | None,
    document_ids: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Returns out [T, H, D] and lse [H, T]; arguments as the public function resolved them."""
    geometry = reference.DualChunkGeometry(chunk_size, local_size)
    if backend == "pytorch":
        with torch.autocast(q.device.type, enabled=False):
            return reference.dual_chunk_forward(
                q,
                k,
                v,
                cu_seqlens_q,
                cu_seqlens_k,
                VarlenOptions(softmax_scale, -1, 0, dropout_p=dropout_p),
                geometry,
                inv_freq=inv_freq,
                logit_scale=logit_scale,
                dropout_seed=dropout_seed,
                document_ids=document_ids,
            )
    schedule = complete_schedule(
        q_tiles, k_tiles, cu_seqlens_q, cu_seqlens_k, q.shape[0], k.shape[0]
    )
    from lctrain_kernels.dual_chunk.triton_fwd import dual_chunk_fwd

    if backend == "hopper":
        from lctrain_kernels.dual_chunk import hopper as dual_chunk
        from lctrain_kernels.gluon import support

        if support.refusal(support.Call(q, k, v), support.DUAL_CHUNK_FORWARD_LIMITS) is None:
            dual_chunk_fwd = dual_chunk.dual_chunk_fwd
    return dual_chunk_fwd(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        schedule.q_tiles,
        schedule.k_tiles,
        inv_freq=inv_freq,
        logit_scale=logit_scale,
        chunk_length=geometry.length,
        succ_length=geometry.succ_length,
        inter_position=geometry.inter_position,
        softmax_scale=softmax_scale,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        document_ids=document_ids,
    )


@dual_chunk_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return (
        q.new_empty((q.shape[0], q.shape[1], v.shape[2])),
        q.new_empty((q.shape[1], q.shape[0]), dtype=lse_dtype),
    )


@torch.library.custom_op("lctrain::dual_chunk_backward", mutates_args=())
def dual_chunk_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    q_tiles: Tensor | None,
    k_tiles: Tensor | None,
    inv_freq: Tensor,
    logit_scale: Tensor | None,
    chunk_size: int,
    local_size: int,
    softmax_scale: float,
    dropout_p: float,
    dropout_seed: Tensor | None,
    document_ids: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dq, dk, dv in the shapes of q, k, v."""
    geometry = reference.DualChunkGeometry(chunk_size, local_size)
    if backend == "pytorch":
        with torch.autocast(q.device.type, enabled=False):
            return reference.dual_chunk_backward(
                dout,
                dlse,
                q,
                k,
                v,
                lse,
                cu_seqlens_q,
                cu_seqlens_k,
                VarlenOptions(softmax_scale, -1, 0, dropout_p=dropout_p),
                geometry,
                inv_freq=inv_freq,
                logit_scale=logit_scale,
                dropout_seed=dropout_seed,
                document_ids=document_ids,
            )
    schedule = complete_schedule(
        q_tiles, k_tiles, cu_seqlens_q, cu_seqlens_k, q.shape[0], k.shape[0]
    )
    operands = (dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k)
    options: dict[str, Any] = {
        "inv_freq": inv_freq,
        "logit_scale": logit_scale,
        "chunk_length": geometry.length,
        "succ_length": geometry.succ_length,
        "inter_position": geometry.inter_position,
        "softmax_scale": softmax_scale,
    }
    if backend == "hopper":
        from lctrain_kernels.dual_chunk import hopper as dual_chunk
        from lctrain_kernels.gluon import support

        deterministic = torch.are_deterministic_algorithms_enabled()
        call = support.Call(q, k, v, dout, deterministic=deterministic, dropout=dropout_p > 0)
        if support.refusal(call, support.DUAL_CHUNK_BACKWARD_LIMITS) is None:
            return dual_chunk.dual_chunk_bwd(
                *operands, schedule.q_tiles, schedule.k_tiles, **options
            )
    from lctrain_kernels.dual_chunk.triton_bwd import dual_chunk_bwd

    return dual_chunk_bwd(
        *operands,
        schedule.q_tiles,
        schedule.k_tiles,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        document_ids=document_ids,
        **options,
    )


@dual_chunk_backward.register_fake
def _(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        torch.empty_like(k, memory_format=torch.contiguous_format),
        torch.empty_like(v, memory_format=torch.contiguous_format),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors, scalars = inputs[:9], inputs[9:13]
    seed, document_ids, backend = inputs[13:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, seed, document_ids, *output)
    ctx.scalars = (*scalars, backend)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    *inputs, seed, document_ids, out, lse = ctx.saved_tensors
    *scalars, backend = ctx.scalars
    q, k, v, *rest = inputs
    grads = torch.ops.lctrain.dual_chunk_backward(
        torch.zeros_like(out) if dout is None else dout,
        dlse,
        q,
        k,
        v,
        out,
        lse,
        *rest,
        *scalars,
        seed,
        document_ids,
        backend,
    )
    return (*grads, *[None] * 13)


dual_chunk_forward.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.lctrain.dual_chunk_forward, get_raw=True)
def dual_chunk_forward_flops(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *args: Any, out_val: Any = None
) -> int:
    """Two matrix products over the visible pairs: those of causal attention."""
    return 2 * causal_pairs(cu_q, cu_k, q, k) * q.shape[1] * 2 * q.shape[2]


@register_flop_formula(torch.ops.lctrain.dual_chunk_backward, get_raw=True)
def dual_chunk_backward_flops(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    *args: Any,
    out_val: Any = None,
) -> int:
    """Five matrix products over the visible pairs, however the kernel computes them."""
    return 5 * causal_pairs(cu_q, cu_k, q, k) * q.shape[1] * 2 * q.shape[2]
