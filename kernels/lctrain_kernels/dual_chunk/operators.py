"""Registers torch's operators lctrain::dual_chunk_forward and lctrain::dual_chunk_backward.

Each has three implementations: PyTorch, portable Triton kernels and Hopper kernels.
"""

import torch
from torch import Tensor

from lctrain_kernels.dual_chunk import reference
from lctrain_kernels.dual_chunk.operands import Operands, Rotation
from lctrain_kernels.operators import Attention, build_operators
from lctrain_kernels.options import AttentionOptions
from lctrain_kernels.pack import PackTensors, TiledPack
from lctrain_kernels.registry import BACKWARD, FORWARD, Refusal, implements
from lctrain_kernels.varlen.reference import VarlenOptions


def _rotation(operands: Operands) -> Rotation:
    geometry = reference.DualChunkGeometry(operands.chunk_size, operands.local_size)
    return Rotation(
        operands.inv_freq, geometry.length, geometry.succ_length, geometry.inter_position
    )


Saved = tuple[Tensor, Tensor]
Gradients = tuple[Tensor, Tensor | None]
Backward = tuple[Tensor, Tensor, Tensor]


def _hopper_refuses(limits: str) -> Refusal:
    def refuses(operands: Operands, options: AttentionOptions, dout: Tensor | None) -> str | None:
        from lctrain_kernels.dual_chunk import hopper_support
        from lctrain_kernels.gluon import support

        call = support.Call(
            *operands[:3],
            dout,
            deterministic=options.deterministic,
            dropout=options.has_dropout,
        )
        return support.refusal(call, getattr(hopper_support, limits))

    return refuses


def _reference_options(options: AttentionOptions) -> VarlenOptions:
    return VarlenOptions(
        options.softmax_scale,
        -1,
        0,
        dropout_p=options.dropout_p,
        first_head=options.first_head,
    )


@implements("dual_chunk", FORWARD, "pytorch")
def _pytorch_forward(operands: Operands, pack: PackTensors, options: AttentionOptions) -> Saved:
    with torch.autocast(operands.q.device.type, enabled=False):
        return reference.dual_chunk_forward(
            *operands[:3],
            pack.cu_seqlens_q,
            pack.cu_seqlens_k,
            _reference_options(options),
            reference.DualChunkGeometry(operands.chunk_size, operands.local_size),
            inv_freq=operands.inv_freq,
            logit_scale=operands.logit_scale,
            dropout_seed=options.dropout_seed,
            document_ids=pack.document_ids,
            query_offsets=pack.query_offsets,
        )


@implements("dual_chunk", FORWARD, "triton")
def _triton_forward(operands: Operands, pack: TiledPack, options: AttentionOptions) -> Saved:
    from lctrain_kernels.dual_chunk.triton_fwd import dual_chunk_fwd

    return dual_chunk_fwd(operands, _rotation(operands), pack, options)


@implements("dual_chunk", FORWARD, "hopper", _hopper_refuses("FORWARD_LIMITS"))
def _hopper_forward(operands: Operands, pack: TiledPack, options: AttentionOptions) -> Saved:
    from lctrain_kernels.dual_chunk.hopper import dual_chunk_fwd

    return dual_chunk_fwd(operands, _rotation(operands), pack, options)


@implements("dual_chunk", BACKWARD, "pytorch")
def _pytorch_backward(
    douts: Gradients, operands: Operands, saved: Saved, pack: PackTensors, options: AttentionOptions
) -> Backward:
    _, lse = saved
    with torch.autocast(operands.q.device.type, enabled=False):
        return reference.dual_chunk_backward(
            *douts,
            *operands[:3],
            lse,
            pack.cu_seqlens_q,
            pack.cu_seqlens_k,
            _reference_options(options),
            reference.DualChunkGeometry(operands.chunk_size, operands.local_size),
            inv_freq=operands.inv_freq,
            logit_scale=operands.logit_scale,
            dropout_seed=options.dropout_seed,
            document_ids=pack.document_ids,
            query_offsets=pack.query_offsets,
        )


@implements("dual_chunk", BACKWARD, "triton")
def _triton_backward(
    douts: Gradients, operands: Operands, saved: Saved, pack: TiledPack, options: AttentionOptions
) -> Backward:
    from lctrain_kernels.dual_chunk.triton_bwd import dual_chunk_bwd

    return dual_chunk_bwd(*douts, operands, _rotation(operands), *saved, pack, options)


@implements("dual_chunk", BACKWARD, "hopper", _hopper_refuses("BACKWARD_LIMITS"))
def _hopper_backward(
    douts: Gradients, operands: Operands, saved: Saved, pack: TiledPack, options: AttentionOptions
) -> Backward:
    from lctrain_kernels.dual_chunk.hopper import dual_chunk_bwd

    return dual_chunk_bwd(*douts, operands, _rotation(operands), *saved, pack, options)


def _fake_forward(operands: Operands) -> Saved:
    q = operands.q
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return (
        q.new_empty((q.shape[0], q.shape[1], operands.v.shape[2])),
        q.new_empty((q.shape[1], q.shape[0]), dtype=lse_dtype),
    )


def _fake_backward(operands: Operands, saved: Saved) -> Backward:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in operands[:3])
    return dq, dk, dv


dual_chunk_attention = build_operators(
    Attention(
        name="dual_chunk",
        operands=Operands,
        results=("out", "lse"),
        saved=("out", "lse"),
        gradients=("q", "k", "v"),
        fake_forward=_fake_forward,
        fake_backward=_fake_backward,
        # FLOP of two products (forward) and five (backward), whichever kernels compute them.
        products=(lambda x: 2 * 2 * x.q.shape[2], lambda x: 5 * 2 * x.q.shape[2]),
        heads={"q": 1, "k": 1, "v": 1, "out": 1, "lse": 0},
    )
)
