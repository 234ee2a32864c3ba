"""Registers torch's operators lctrain::varlen_forward and lctrain::varlen_backward.

Each has three implementations: PyTorch, portable Triton kernels and Hopper kernels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lctrain_kernels.operators import Attention, build_operators
from lctrain_kernels.options import AttentionOptions
from lctrain_kernels.pack import PackTensors, TiledPack
from lctrain_kernels.registry import BACKWARD, FORWARD, Refusal, implements
from lctrain_kernels.varlen import reference


class Operands(NamedTuple):
    """Tensor inputs of the operators of varlen attention.

    Attributes:
        q: Packed queries [T, H, D].
        k: Packed keys [Tk, Hk, D].
        v: Packed values [Tk, Hk, D].
    """

    q: Tensor
    k: Tensor
    v: Tensor


def _hopper_refuses(limits: str) -> Refusal:
    def refuses(operands: Operands, options: AttentionOptions, dout: Tensor | None) -> str | None:
        from lctrain_kernels.gluon import support

        call = support.Call(
            *operands,
            dout,
            options.alibi_slopes is not None,
            options.deterministic,
            options.has_dropout,
        )
        return support.refusal(call, getattr(support, limits))

    return refuses


def _reference_options(options: AttentionOptions) -> reference.VarlenOptions:
    """Returns the options of the PyTorch path. A window tensor is read, which synchronises."""
    left, right = options.window_left, options.window_right
    if options.window is not None:
        left, right = options.window.tolist()
    return reference.VarlenOptions(
        options.softmax_scale, left, right, options.softcap, options.dropout_p, options.first_head
    )


@implements("varlen", FORWARD, "pytorch")
def _pytorch_forward(
    operands: Operands, pack: PackTensors, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    with torch.autocast(operands.q.device.type, enabled=False):
        return reference.varlen_forward(
            *operands,
            pack.cu_seqlens_q,
            pack.cu_seqlens_k,
            _reference_options(options),
            alibi_slopes=options.alibi_slopes,
            learnable_sink=options.learnable_sink,
            dropout_seed=options.dropout_seed,
            document_ids=pack.document_ids,
            query_offsets=pack.query_offsets,
        )


@implements("varlen", FORWARD, "triton")
def _triton_forward(
    operands: Operands, pack: TiledPack, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    from lctrain_kernels.varlen.triton_fwd import varlen_fwd

    return varlen_fwd(*operands, pack, options)


@implements("varlen", FORWARD, "hopper", _hopper_refuses("FORWARD_LIMITS"))
def _hopper_forward(
    operands: Operands, pack: TiledPack, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    from lctrain_kernels.varlen.hopper import varlen_fwd

    return varlen_fwd(*operands, pack, options)


Gradients = tuple[Tensor, Tensor | None]
Backward = tuple[Tensor, Tensor, Tensor, Tensor]


def _hopper_overwrites(
    operands: Operands, pack: PackTensors, options: AttentionOptions
) -> frozenset[str]:
    """Returns the operands that the Hopper backward can overwrite.

    One program alone reads a tile of keys and values, before it writes their gradients. The queries
    can be overwritten once all programs have added to a float32 sum of dq, which is rounded then.
    """
    from lctrain_kernels.gluon.config import sums_dq_apart

    documents = pack.cu_seqlens_q.shape[0] - 1
    apart = sums_dq_apart(operands.q.shape, documents, pack.max_seqlen_q, options)
    return frozenset(("q", "k", "v") if apart else ("k", "v"))


def _pytorch_overwrites(
    operands: Operands, pack: PackTensors, options: AttentionOptions
) -> frozenset[str]:
    """Returns all operands, which are read before; on device meta, those of the planned kernels."""
    if not operands.q.is_meta:
        return frozenset(operands._fields)
    from lctrain_kernels.gluon import support

    refused = _hopper_refuses("BACKWARD_LIMITS")(operands, options, None)
    if refused is not None or not support.may_be_planned():
        return frozenset()  # as the Triton kernels
    return _hopper_overwrites(operands, pack, options)


@implements("varlen", BACKWARD, "pytorch", overwrites=_pytorch_overwrites)
def _pytorch_backward(
    douts: Gradients,
    operands: Operands,
    saved: tuple[Tensor, Tensor],
    pack: PackTensors,
    options: AttentionOptions,
    into: Sequence[Tensor] | None = None,
) -> Backward:
    _, lse = saved
    with torch.autocast(operands.q.device.type, enabled=False):
        return reference.varlen_backward(
            *douts,
            *operands,
            lse,
            pack.cu_seqlens_q,
            pack.cu_seqlens_k,
            _reference_options(options),
            alibi_slopes=options.alibi_slopes,
            dropout_seed=options.dropout_seed,
            document_ids=pack.document_ids,
            query_offsets=pack.query_offsets,
            into=into,
        )


@implements("varlen", BACKWARD, "triton")
def _triton_backward(
    douts: Gradients,
    operands: Operands,
    saved: tuple[Tensor, Tensor],
    pack: TiledPack,
    options: AttentionOptions,
) -> Backward:
    from lctrain_kernels.varlen.triton_bwd import varlen_bwd

    return varlen_bwd(*douts, *operands, *saved, pack, options)


@implements(
    "varlen", BACKWARD, "hopper", _hopper_refuses("BACKWARD_LIMITS"), overwrites=_hopper_overwrites
)
def _hopper_backward(
    douts: Gradients,
    operands: Operands,
    saved: tuple[Tensor, Tensor],
    pack: TiledPack,
    options: AttentionOptions,
    into: Sequence[Tensor] | None = None,
) -> Backward:
    from lctrain_kernels.varlen.hopper import varlen_bwd

    return varlen_bwd(*douts, *operands, *saved, pack, options, into)


def _fake_forward(operands: Operands) -> tuple[Tensor, Tensor]:
    q = operands.q
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return (
        q.new_empty((q.shape[0], q.shape[1], operands.v.shape[2])),
        q.new_empty((q.shape[1], q.shape[0]), dtype=lse_dtype),
    )


def _fake_backward(operands: Operands, saved: tuple[Tensor, Tensor]) -> Backward:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in operands)
    return dq, dk, dv, torch.empty_like(saved[1])


def _finish(
    gradients: dict[str, Tensor],
    operands: Operands,
    pack: PackTensors,
    options: AttentionOptions,
    saved: dict[str, Tensor],
) -> dict[str, Tensor | None]:
    """Turns the kernels' results into the gradients of the inputs q, k, v and the learnable sink.

    It removes delta from `gradients`, and computes the sink's gradient from it, if there is a sink.
    The other gradients stay as they are.

    Args:
        gradients: Results of the backward, by name: q, k, v, and delta [H, T].
        operands: Inputs of the forward; not used.
        pack: Documents of the call; not used.
        options: Options of the call, among them the learnable sink [H].
        saved: out [T, H, D] and lse [H, T] of the forward.
    """
    sink, delta, lse = options.learnable_sink, gradients.pop("delta"), saved["lse"]
    if sink is None:
        return {**gradients}
    # A sink has a weight but no value, so dP = 0 and dS = -p * delta.
    weight = torch.exp(sink.to(lse.dtype)[:, None] - lse).masked_fill(lse == -torch.inf, 0.0)
    return {**gradients, "learnable_sink": -(weight * delta).sum(1).to(sink.dtype)}


varlen_attention = build_operators(
    Attention(
        name="varlen",
        operands=Operands,
        results=("out", "lse"),
        saved=("out", "lse"),
        gradients=("q", "k", "v", "delta"),
        fake_forward=_fake_forward,
        fake_backward=_fake_backward,
        # FLOP of two products (forward) and five (backward), whichever kernels compute them.
        products=(lambda x: 2 * 2 * x.q.shape[2], lambda x: 5 * 2 * x.q.shape[2]),
        finish=_finish,
        heads={"q": 1, "k": 1, "v": 1, "out": 1, "lse": 0, "delta": 0},
        overwritten=("q", "k", "v"),
    )
)
