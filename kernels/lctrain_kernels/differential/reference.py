"""Differential attention in plain PyTorch: the reference of the tests, and the CPU path.

``out = A1 v - lam A2 v`` with ``A_b = softmax(s q_b k_b^T)``; each head is a pair of branches. The
branches are computed as heads of one plain attention: branch b of head h is query head ``2 h + b``.
The dropout RNG also uses this head index. So the masks are those of flash_attn_varlen_func over the
interleaved heads (q1 = q[:, 0::2], q2 = q[:, 1::2]).
"""

import torch
from torch import Tensor

from lctrain_kernels.reference.attention import dense_attention
from lctrain_kernels.varlen.reference import VarlenOptions, varlen_backward, varlen_forward


def interleave_heads(first: Tensor, second: Tensor) -> Tensor:
    """Interleaves the heads of two tensors [T, H, D] to first[0], second[0], first[1], ...

    Returns a tensor [T, 2 H, D]."""
    return torch.stack((first, second), dim=2).flatten(1, 2)


def _branches_as_heads(
    q1: Tensor, q2: Tensor, k1: Tensor, k2: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns q, k and v of one plain attention whose heads are the branches.

    The shapes are q [T, 2 H, D], k [Tk, 2 H, D] and v [Tk, 2 H, Dv]. Key/value heads are repeated,
    so that query head 2 h + b reads key/value head 2 h + b.
    """
    group = q1.shape[1] // k1.shape[1]
    k = interleave_heads(k1.repeat_interleave(group, 1), k2.repeat_interleave(group, 1))
    return interleave_heads(q1, q2), k, v.repeat_interleave(2 * group, 1)


def _own(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a contiguous copy in `dtype`: results of an operator must not share memory."""
    return x.to(dtype, copy=True, memory_format=torch.contiguous_format)


def dense_differential(
    q1: Tensor,
    q2: Tensor,
    k1: Tensor,
    k2: Tensor,
    v: Tensor,
    lam: Tensor,
    *,
    softmax_scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor = 0,
    document_id: int = 0,
    first_query: int = 0,
    first_head: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes differential attention of one document by two dense softmaxes.

    Autograd gives all gradients. The function is the reference of the tests.

    Args:
        q1: Queries of branch 1, [Lq, H, D].
        q2: Queries of branch 2, [Lq, H, D].
        k1: Keys of branch 1, [Lk, Hk, D]; head h reads key/value head h // (H / Hk).
        k2: Keys of branch 2, [Lk, Hk, D].
        v: Values [Lk, Hk, Dv].
        lam: Lambda: a scalar, [H] or [Lq, H].
        softmax_scale: Factor of q.k; D^-0.5 by default.
        window: (left, right); causal is (-1, 0).
        dropout_p: Probability of dropping a weight of a branch after its softmax.
        dropout_seed: Seed of the dropout masks.
        document_id: Id of the document for the dropout RNG.
        first_query: Position within the document of the first row of queries, for the dropout mask.
        first_head: Index of the first head for the dropout RNG.

    Returns:
        out [Lq, H, Dv] in q1's dtype, lse1 and lse2 [H, Lq].
    """
    out, lse, _ = dense_attention(
        *_branches_as_heads(q1, q2, k1, k2, v),
        softmax_scale=softmax_scale,
        window=window,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        document_id=document_id,
        first_query=first_query,
        first_head=2 * first_head,
    )
    factor = lam.expand(q1.shape[:2]).to(out.dtype)[..., None]
    return out[:, 0::2] - factor * out[:, 1::2], lse[0::2], lse[1::2]


def differential_forward(
    q1: Tensor,
    q2: Tensor,
    k1: Tensor,
    k2: Tensor | None,
    v: Tensor,
    lam: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    options: VarlenOptions,
    *,
    dropout_seed: Tensor | None = None,
    document_ids: Tensor | None = None,
    query_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Computes the forward over packed documents, in chunks of queries as in varlen/reference.py.

    Args:
        q1: Packed queries of branch 1, [T, H, D], any floating dtype.
        q2: Packed queries of branch 2, [T, H, D].
        k1: Packed keys of branch 1, [Tk, Hk, D].
        k2: Packed keys of branch 2, [Tk, Hk, D]; None if both branches read k1.
        v: Packed values [Tk, Hk, Dv].
        lam: Lambda of each token and head, [T, H].
        cu_seqlens_q: Cumulative query lengths, [N + 1] int32.
        cu_seqlens_k: Cumulative key lengths, [N + 1] int32.
        options: Scale, window and dropout.
        dropout_seed: Seed of the dropout mask, one int64 element; required with dropout.
        document_ids: Ids of the documents for the dropout RNG, [N] int32. By default, a document's
            index in the pack.
        query_offsets: Position within its document of the first query that is passed, [N] int32,
            for the dropout mask; 0 by default.

    Returns:
        out, out1 = A1 v and out2 = A2 v [T, H, Dv] in q1's dtype, lse1 and lse2 [H, T] float32
        (float64 for float64 inputs).
    """
    state = torch.promote_types(q1.dtype, torch.float32)
    operands = (x.to(state) for x in (q1, q2, k1, k1 if k2 is None else k2, v))
    both, lse = varlen_forward(
        *_branches_as_heads(*operands),
        cu_seqlens_q,
        cu_seqlens_k,
        options,
        dropout_seed=dropout_seed,
        document_ids=document_ids,
        query_offsets=query_offsets,
    )
    out1, out2 = both[:, 0::2], both[:, 1::2]
    out = out1 - lam.to(state)[..., None] * out2
    return (
        _own(out, q1.dtype),
        _own(out1, q1.dtype),
        _own(out2, q1.dtype),
        _own(lse[0::2], state),
        _own(lse[1::2], state),
    )


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
    out2: Tensor,
    lse1: Tensor,
    lse2: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    options: VarlenOptions,
    *,
    dropout_seed: Tensor | None = None,
    document_ids: Tensor | None = None,
    query_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Computes the backward of differential_forward.

    dout, dlse1 and dlse2 are the gradients of its results out, lse1 and lse2; out2, lse1 and lse2
    are results of it. The other arguments are those of differential_forward.

    Returns:
        dq1, dq2 [T, H, D], dk1, dk2 [Tk, Hk, D], dv [Tk, Hk, Dv] in the inputs' dtype, and
        dlam [H, T] in the dtype of lse. If k2 is None, dk1 is the gradient of the shared k, and dk2
        is an empty tensor.
    """
    state = torch.promote_types(q1.dtype, torch.float32)
    grad = dout.to(state)
    dlse = None
    if dlse1 is not None or dlse2 is not None:
        parts = [torch.zeros_like(lse1) if x is None else x for x in (dlse1, dlse2)]
        dlse = torch.stack(parts, dim=1).flatten(0, 1)
    operands = (x.to(state) for x in (q1, q2, k1, k1 if k2 is None else k2, v))
    dq, dk, dv, _ = varlen_backward(
        interleave_heads(grad, -lam.to(state)[..., None] * grad),
        dlse,
        *_branches_as_heads(*operands),
        torch.stack((lse1, lse2), dim=1).flatten(0, 1),
        cu_seqlens_q,
        cu_seqlens_k,
        options,
        dropout_seed=dropout_seed,
        document_ids=document_ids,
        query_offsets=query_offsets,
    )
    heads_k = k1.shape[1]
    dk1, dk2 = dk.unflatten(1, (heads_k, -1, 2)).sum(2).unbind(2)
    if k2 is None:
        dk1, dk2 = dk1 + dk2, dk2.new_empty(0)
    dv = dv.unflatten(1, (heads_k, -1)).sum(2)
    dlam = -(grad * out2.to(state)).sum(-1).t()
    grads = (_own(x, q1.dtype) for x in (dq[:, 0::2], dq[:, 1::2], dk1, dk2, dv))
    dq1, dq2, dk1, dk2, dv = grads
    return dq1, dq2, dk1, dk2, dv, _own(dlam, state)
