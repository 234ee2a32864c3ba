"""lctrain::varlen_forward and varlen_backward: the operators behind the public functions.

As operators of torch.library they have fake implementations (torch.compile, meta tensors),
autograd, and FLOP formulas, and selective activation checkpointing can name them in a policy.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lctrain_kernels.schedule import complete_schedule
from lctrain_kernels.varlen import reference


@torch.library.custom_op("lctrain::varlen_forward", mutates_args=())
def varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    q_tiles: Tensor | None,
    k_tiles: Tensor | None,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    window: Tensor | None,
    softcap: float,
    alibi_slopes: Tensor | None,
    learnable_sink: Tensor | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
    document_ids: Tensor | None,
    deterministic: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Returns out [T, H, D] and lse [H, T]; arguments as the public function resolved them."""
    if backend == "pytorch":
        options = reference_options(
            softmax_scale, window_left, window_right, window, softcap, dropout_p
        )
        with torch.autocast(q.device.type, enabled=False):
            return reference.varlen_forward(
                q,
                k,
                v,
                cu_seqlens_q,
                cu_seqlens_k,
                options,
                alibi_slopes=alibi_slopes,
                learnable_sink=learnable_sink,
                dropout_seed=dropout_seed,
                document_ids=document_ids,
            )
    schedule = complete_schedule(
        q_tiles, k_tiles, cu_seqlens_q, cu_seqlens_k, q.shape[0], k.shape[0]
    )
    if backend == "hopper":
        from lctrain_kernels.gluon import support
        from lctrain_kernels.varlen import hopper as varlen

        call = support.Call(q, k, v, alibi=alibi_slopes is not None)
        if support.refusal(call, support.FORWARD_LIMITS) is None:
            return varlen.varlen_fwd(
                q,
                k,
                v,
                cu_seqlens_q,
                cu_seqlens_k,
                schedule.q_tiles,
                softmax_scale=softmax_scale,
                window=(window_left, window_right) if window is None else window,
                softcap=softcap,
                learnable_sink=learnable_sink,
                dropout_p=dropout_p,
                dropout_seed=dropout_seed,
                document_ids=document_ids,
            )
    from lctrain_kernels.varlen.triton_fwd import varlen_fwd

    return varlen_fwd(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        schedule.q_tiles,
        softmax_scale=softmax_scale,
        window=(window_left, window_right) if window is None else window,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        learnable_sink=learnable_sink,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        document_ids=document_ids,
    )


@varlen_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return (
        q.new_empty((q.shape[0], q.shape[1], v.shape[2])),
        q.new_empty((q.shape[1], q.shape[0]), dtype=lse_dtype),
    )


@torch.library.custom_op("lctrain::varlen_backward", mutates_args=())
def varlen_backward(
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
    softmax_scale: float,
    window_left: int,
    window_right: int,
    window: Tensor | None,
    softcap: float,
    alibi_slopes: Tensor | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
    document_ids: Tensor | None,
    deterministic: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns dq, dk, dv in the shapes of q, k, v and delta [H, T] = rowsum(dout * out) - dlse."""
    if backend == "pytorch":
        options = reference_options(
            softmax_scale, window_left, window_right, window, softcap, dropout_p
        )
        with torch.autocast(q.device.type, enabled=False):
            return reference.varlen_backward(
                dout,
                dlse,
                q,
                k,
                v,
                lse,
                cu_seqlens_q,
                cu_seqlens_k,
                options,
                alibi_slopes=alibi_slopes,
                dropout_seed=dropout_seed,
                document_ids=document_ids,
            )
    schedule = complete_schedule(
        q_tiles, k_tiles, cu_seqlens_q, cu_seqlens_k, q.shape[0], k.shape[0]
    )
    if backend == "hopper":
        from lctrain_kernels.gluon import support
        from lctrain_kernels.varlen import hopper as varlen

        call = support.Call(q, k, v, dout, alibi_slopes is not None, deterministic, dropout_p > 0)
        if support.refusal(call, support.BACKWARD_LIMITS) is None:
            return varlen.varlen_bwd(
                dout,
                dlse,
                q,
                k,
                v,
                out,
                lse,
                cu_seqlens_q,
                cu_seqlens_k,
                schedule.k_tiles,
                softmax_scale=softmax_scale,
                window=(window_left, window_right) if window is None else window,
                softcap=softcap,
                dropout_p=dropout_p,
                dropout_seed=dropout_seed,
                document_ids=document_ids,
                deterministic=deterministic,
            )
    from lctrain_kernels.varlen.triton_bwd import varlen_bwd

    return varlen_bwd(
        dout,
        dlse,
        q,
        k,
        v,
        out,
        lse,
        cu_seqlens_q,
        cu_seqlens_k,
        schedule.q_tiles,
        schedule.k_tiles,
        softmax_scale=softmax_scale,
        window=(window_left, window_right) if window is None else window,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        document_ids=document_ids,
        deterministic=deterministic,
    )


@varlen_backward.register_fake
def _(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        torch.empty_like(k, memory_format=torch.contiguous_format),
        torch.empty_like(v, memory_format=torch.contiguous_format),
        torch.empty_like(lse),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    (q, k, v, cu_q, cu_k, q_tiles, k_tiles, scale, left, right, window, softcap, alibi, sink, p) = (
        inputs[:15]
    )
    seed, document_ids, deterministic, backend = inputs[15:]
    out, lse = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        q, k, v, out, lse, cu_q, cu_k, q_tiles, k_tiles, window, alibi, sink, seed, document_ids
    )
    ctx.scalars = (scale, left, right, softcap, p, deterministic, backend)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, cu_q, cu_k, q_tiles, k_tiles, window, alibi, sink, seed, document_ids = (
        ctx.saved_tensors
    )
    scale, left, right, softcap, p, deterministic, backend = ctx.scalars
    dout = torch.zeros_like(out) if dout is None else dout
    dq, dk, dv, delta = torch.ops.lctrain.varlen_backward(
        dout,
        dlse,
        q,
        k,
        v,
        out,
        lse,
        cu_q,
        cu_k,
        q_tiles,
        k_tiles,
        scale,
        left,
        right,
        window,
        softcap,
        alibi,
        p,
        seed,
        document_ids,
        deterministic,
        backend,
    )
    dsink = None
    if sink is not None and ctx.needs_input_grad[13]:
        # The sink has a weight and no value, so its dP is 0 and dS = -p * delta.
        weight = torch.exp(sink.to(lse.dtype)[:, None] - lse).masked_fill(lse == -torch.inf, 0.0)
        dsink = -(weight * delta).sum(1).to(sink.dtype)
    return (dq, dk, dv, *[None] * 10, dsink, *[None] * 5)


varlen_forward.register_autograd(_backward, setup_context=_setup_context)


def reference_options(
    softmax_scale: float,
    window_left: int,
    window_right: int,
    window: Tensor | None,
    softcap: float,
    dropout_p: float,
) -> reference.VarlenOptions:
    """Options of the PyTorch path; a window on a device is read."""
    if window is not None:
        window_left, window_right = window.tolist()
    return reference.VarlenOptions(softmax_scale, window_left, window_right, softcap, dropout_p)


def visible_pairs(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, window_left: int, window_right: int
) -> int:
    """Returns how many (query, key) pairs the mask leaves visible, over all documents.

    Reads the lengths, so on a GPU it synchronises; FLOP counters only.
    """
    pairs = 0
    lengths_q, lengths_k = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    for length_q, length_k in zip(lengths_q, lengths_k, strict=True):
        position = torch.arange(length_q, dtype=torch.int64) + length_k - length_q
        high = torch.full_like(position, length_k - 1)
        low = torch.zeros_like(position)
        if window_right >= 0:
            high = torch.minimum(high, position + window_right)
        if window_left >= 0:
            low = torch.maximum(low, position - window_left)
        pairs += int((high - low + 1).clamp(min=0).sum())
    return pairs


def attended_pairs(
    cu_q: Tensor, cu_k: Tensor, left: int, right: int, window: Tensor | None, q: Tensor, k: Tensor
) -> int:
    """The visible pairs under a window; of meta tensors as if all documents were equal."""
    if cu_q.is_meta or isinstance(cu_q, torch._subclasses.FakeTensor):
        documents = max(1, cu_q.shape[0] - 1)  # lengths unknown: as if all were equal
        per_document = (q.shape[0] // documents) * (k.shape[0] // documents) * documents
        return per_document // 2 if right == 0 else per_document
    if window is not None:
        left, right = window.tolist()
    return visible_pairs(cu_q, cu_k, left, right)


def causal_pairs(cu_q: Tensor, cu_k: Tensor, q: Tensor, k: Tensor) -> int:
    """The visible pairs of causal attention; of meta tensors as if all documents were equal."""
    return attended_pairs(cu_q, cu_k, -1, 0, None, q, k)


@register_flop_formula(torch.ops.lctrain.varlen_forward, get_raw=True)
def varlen_forward_flops(
    q: Tensor,
    k: Tensor,
    v: Tensor,
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
    """Two matrix products over the visible pairs."""
    return 2 * attended_pairs(cu_q, cu_k, left, right, window, q, k) * q.shape[1] * 2 * q.shape[2]


@register_flop_formula(torch.ops.lctrain.varlen_backward, get_raw=True)
def varlen_backward_flops(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
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
    """Five matrix products over the visible pairs, however the kernel computes them."""
    return 5 * attended_pairs(cu_q, cu_k, left, right, window, q, k) * q.shape[1] * 2 * q.shape[2]
