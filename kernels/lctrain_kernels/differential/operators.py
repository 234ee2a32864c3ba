"""Registers torch's operators lctrain::differential_forward and lctrain::differential_backward.

Each has three implementations: PyTorch, portable Triton kernels and Hopper kernels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lctrain_kernels.differential import reference
from lctrain_kernels.operators import Attention, build_operators
from lctrain_kernels.options import AttentionOptions
from lctrain_kernels.pack import PackTensors, TiledPack
from lctrain_kernels.registry import BACKWARD, FORWARD, Refusal, implements
from lctrain_kernels.varlen.reference import VarlenOptions


class Operands(NamedTuple):
    """Tensor inputs of the operators of differential attention.

    Attributes:
        q1: Packed queries of branch 1, [T, H, D].
        q2: Packed queries of branch 2, [T, H, D].
        k1: Packed keys of branch 1, [Tk, Hk, D].
        k2: Packed keys of branch 2, [Tk, Hk, D]; None if both branches read k1.
        v: Packed values [Tk, Hk, Dv].
        lam: Lambda of each token and head, [T, H].
    """

    q1: Tensor
    q2: Tensor
    k1: Tensor
    k2: Tensor | None
    v: Tensor
    lam: Tensor


Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Saved = tuple[Tensor, Tensor, Tensor, Tensor]
Gradients = tuple[Tensor, Tensor | None, Tensor | None]
Backward = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _hopper_refuses(limits: str) -> Refusal:
    def refuses(operands: Operands, options: AttentionOptions, dout: Tensor | None) -> str | None:
        from lctrain_kernels.differential import hopper_support
        from lctrain_kernels.gluon import support

        call = hopper_support.DifferentialCall(
            *operands[:5], dout, options.deterministic, options.has_dropout
        )
        return support.refusal(call, getattr(hopper_support, limits))

    return refuses


def _reference_options(options: AttentionOptions) -> VarlenOptions:
    """Returns the options of the PyTorch path. A window tensor is read, which synchronises."""
    left, right = options.window_left, options.window_right
    if options.window is not None:
        left, right = options.window.tolist()
    # The branches are computed as 2 H heads: branch b of head h is head 2 h + b.
    first_head = 2 * options.first_head
    return VarlenOptions(options.softmax_scale, left, right, 0.0, options.dropout_p, first_head)


@implements("differential", FORWARD, "pytorch")
def _pytorch_forward(operands: Operands, pack: PackTensors, options: AttentionOptions) -> Results:
    with torch.autocast(operands.q1.device.type, enabled=False):
        return reference.differential_forward(
            *operands,
            pack.cu_seqlens_q,
            pack.cu_seqlens_k,
            _reference_options(options),
            dropout_seed=options.dropout_seed,
            document_ids=pack.document_ids,
            query_offsets=pack.query_offsets,
        )


@implements("differential", FORWARD, "triton")
def _triton_forward(operands: Operands, pack: TiledPack, options: AttentionOptions) -> Results:
    from lctrain_kernels.differential.triton_fwd import differential_fwd

    return differential_fwd(*operands, pack, options)


@implements("differential", FORWARD, "hopper", _hopper_refuses("FORWARD_LIMITS"))
def _hopper_forward(operands: Operands, pack: TiledPack, options: AttentionOptions) -> Results:
    from lctrain_kernels.differential.hopper import differential_fwd

    return differential_fwd(*operands, pack, options)


@implements("differential", BACKWARD, "pytorch")
def _pytorch_backward(
    douts: Gradients, operands: Operands, saved: Saved, pack: PackTensors, options: AttentionOptions
) -> Backward:
    dout, dlse1, dlse2 = douts
    _, out2, lse1, lse2 = saved
    with torch.autocast(operands.q1.device.type, enabled=False):
        return reference.differential_backward(
            dout,
            dlse1,
            dlse2,
            *operands,
            out2,
            lse1,
            lse2,
            pack.cu_seqlens_q,
            pack.cu_seqlens_k,
            _reference_options(options),
            dropout_seed=options.dropout_seed,
            document_ids=pack.document_ids,
            query_offsets=pack.query_offsets,
        )


@implements("differential", BACKWARD, "triton")
def _triton_backward(
    douts: Gradients, operands: Operands, saved: Saved, pack: TiledPack, options: AttentionOptions
) -> Backward:
    from lctrain_kernels.differential.triton_bwd import differential_bwd

    dout, dlse1, dlse2 = douts
    out1, out2, lse1, lse2 = saved
    return differential_bwd(dout, dlse1, dlse2, *operands, out1, out2, lse1, lse2, pack, options)


@implements("differential", BACKWARD, "hopper", _hopper_refuses("BACKWARD_LIMITS"))
def _hopper_backward(
    douts: Gradients, operands: Operands, saved: Saved, pack: TiledPack, options: AttentionOptions
) -> Backward:
    from lctrain_kernels.differential.hopper import differential_bwd

    dout, dlse1, dlse2 = douts
    out1, out2, lse1, lse2 = saved
    return differential_bwd(dout, dlse1, dlse2, *operands, out1, out2, lse1, lse2, pack, options)


def _fake_forward(operands: Operands) -> Results:
    q = operands.q1
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    shape, lse_shape = (*q.shape[:2], operands.v.shape[2]), (q.shape[1], q.shape[0])
    return (
        q.new_empty(shape),
        q.new_empty(shape),
        q.new_empty(shape),
        q.new_empty(lse_shape, dtype=lse_dtype),
        q.new_empty(lse_shape, dtype=lse_dtype),
    )


def _fake_backward(operands: Operands, saved: Saved) -> Backward:
    q1, _, k1, k2, v, _ = operands
    return (
        q1.new_empty(q1.shape),
        q1.new_empty(q1.shape),
        q1.new_empty(k1.shape),
        q1.new_empty(0 if k2 is None else k1.shape),
        q1.new_empty(v.shape),
        torch.empty_like(saved[2]),
    )


def _finish(
    gradients: dict[str, Tensor],
    operands: Operands,
    pack: PackTensors,
    options: AttentionOptions,
    saved: dict[str, Tensor],
) -> dict[str, Tensor | None]:
    """Turns the kernels' results into the gradients of the inputs q1, q2, k1, k2, v and lam.

    It transposes lam's gradient, [H, T] -> [T, H]. If both branches read k1, the kernels have added
    both gradients into k1's, and k2's becomes None. The other gradients stay as they are.
    """
    dk2 = None if operands.k2 is None else gradients["k2"]
    return {**gradients, "k2": dk2, "lam": gradients["lam"].t()}


differential_attention = build_operators(
    Attention(
        name="differential",
        operands=Operands,
        results=("out", "out1", "out2", "lse1", "lse2"),
        saved=("out1", "out2", "lse1", "lse2"),
        gradients=("q1", "q2", "k1", "k2", "v", "lam"),
        fake_forward=_fake_forward,
        fake_backward=_fake_backward,
        # FLOP of two products of D and two of Dv (forward), and of six and two (backward).
        products=(
            lambda x: 2 * (2 * x.q1.shape[2] + 2 * x.v.shape[2]),
            lambda x: 2 * (6 * x.q1.shape[2] + 2 * x.v.shape[2]),
        ),
        finish=_finish,
    )
)
