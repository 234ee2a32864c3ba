"""diff_attn_varlen_func: the difference of two attentions over the same values, in one kernel.

The function builds a Pack from its arguments. Callers that have a Pack, as a model's layers do,
call diff_attn_pack_func.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lctrain_kernels.backend import select_backend
from lctrain_kernels.differential.checks import check_branches, check_lam
from lctrain_kernels.differential.operators import Operands, differential_attention
from lctrain_kernels.options import checked_options
from lctrain_kernels.pack import Pack, checked_shared_pack
from lctrain_kernels.padding import pad_head_dim
from lctrain_kernels.registry import require_backend
from lctrain_kernels.schedule import TileSchedule


def diff_attn_varlen_func(
    q1: Tensor,
    q2: Tensor,
    k1: Tensor,
    k2: Tensor,
    v: Tensor,
    lam: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = True,
    window_size: Sequence[int] | Tensor = (-1, -1),
    return_lse: bool = False,
    dropout_seed: int | Tensor | None = None,
    document_ids: Tensor | None = None,
    schedule: TileSchedule | None = None,
    backend: str = "auto",
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Computes softmax(q1 k1') v - lam softmax(q2 k2') v over packed documents.

    This is the attention of "Differential Transformer" (arXiv 2410.05258) and of its second version
    (microsoft/unilm, 2026). A head is a pair of branches. Version 1 has one k per branch and values
    with head dim 2 D; the caller applies its norm. Version 2 has one k for both branches, values
    with head dim D, and q1 = q[:, 0::2], q2 = q[:, 1::2].

    Masks are aligned at the bottom right. A query that sees no key has out = 0, lse = -inf and zero
    gradients. Documents may have length 0.

    Args:
        q1: Packed queries of branch 1, [T, H, D], float16 or bfloat16, any strides with last stride
            1, D at most 128. The PyTorch path computes float32 and float64.
        q2: Packed queries of branch 2, [T, H, D].
        k1: Packed keys of branch 1, [Tk, Hk, D]; head h reads head h // (H / Hk).
        k2: Packed keys of branch 2, [Tk, Hk, D]. Pass the same tensor object as k1 for version 2;
            it is then loaded once.
        v: Packed values [Tk, Hk, Dv], Dv = D or 2 D.
        lam: Lambda, floating point: a scalar, [H] or [T, H]. Its gradient is summed in float32.
        cu_seqlens: Cumulative document lengths from 0 to T, [N + 1] int32.
        max_seqlen: Longest document, a Python int.
        dropout_p: Probability of dropping an attention weight, rounded to a multiple of 1/65536.
            Each branch has a mask of its own, that of query head 2 h + branch.
        softmax_scale: Factor of q.k; D^-0.5 by default.
        causal: Whether query i sees only the keys up to its own position.
        window_size: (left, right) keys that a query sees before and after its own position; two
            ints or an int32 device tensor [2]; -1 is unbounded.
        return_lse: Whether to return (out, lse1, lse2) instead of out.
        dropout_seed: Seed of the dropout mask, an int or an int64 tensor of one element on q1's
            device. By default, it is drawn from torch's generator of that device.
        document_ids: Ids of the documents for the dropout RNG, [N] int32. By default, a document's
            index in the pack.
        schedule: Schedule that make_schedule returned, on q1's device. By default, one is built on
            the device, once per cu_seqlens tensor.
        backend: "auto", "hopper", "triton" or "pytorch". A backend other than "auto" raises an
            error if it does not support the call. On a Hopper GPU "auto" chooses "hopper" for every
            forward and backward that the Hopper kernels support.
        cu_seqlens_k: Cumulative key lengths, [N + 1] int32, if documents have more keys than
            queries, as with a key/value cache. Queries are then the last positions of their
            document. By default, cu_seqlens.
        max_seqlen_k: Most keys of a document; max_seqlen by default.

    Returns:
        out [T, H, Dv] in q1's dtype; with return_lse also lse1 and lse2 [H, T] float32, natural
        logarithms, before dropout, differentiable.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if shapes, devices or values do not fit; the message names the remedy.
    """
    check_branches(q1, q2, k1, k2, v)
    pack = checked_shared_pack(
        q1,
        k1,
        cu_seqlens,
        cu_seqlens_k,
        max_seqlen,
        max_seqlen_k,
        document_ids=document_ids,
        schedule=schedule,
    )
    out, lse1, lse2 = diff_attn_pack_func(
        q1,
        q2,
        k1,
        k2,
        v,
        lam,
        pack,
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        dropout_seed=dropout_seed,
        backend=backend,
    )
    return (out, lse1, lse2) if return_lse else out


def diff_attn_pack_func(
    q1: Tensor,
    q2: Tensor,
    k1: Tensor,
    k2: Tensor,
    v: Tensor,
    lam: Tensor,
    pack: Pack,
    *,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = True,
    window_size: Sequence[int] | Tensor = (-1, -1),
    dropout_seed: int | Tensor | None = None,
    first_head: int = 0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes diff_attn_varlen_func over the documents of a Pack.

    The Pack was validated when it was built, so a call reads none of its values.

    Args:
        q1: Packed queries of branch 1, [T, H, D].
        q2: Packed queries of branch 2, [T, H, D].
        k1: Packed keys of branch 1, [Tk, Hk, D].
        k2: Packed keys of branch 2, [Tk, Hk, D]; the same tensor object as k1 if branches share
            keys.
        v: Packed values [Tk, Hk, Dv], Dv = D or 2 D.
        lam: Lambda, floating point: a scalar, [H] or [T, H].
        pack: Documents of the queries and keys.
        dropout_p: Probability of dropping an attention weight.
        softmax_scale: Factor of q.k; D^-0.5 by default.
        causal: Whether query i sees only the keys up to its own position.
        window_size: (left, right) keys around a query's own position; -1 is unbounded.
        dropout_seed: Seed of the dropout mask, an int or an int64 tensor of one element.
        first_head: Index of the call's first head (a pair of branches) for the dropout RNG. A rank
            that holds a slice of the heads passes its first one: its mask is then that of these
            heads in a call with all heads.
        backend: Implementation: "auto", "hopper", "triton" or "pytorch".

    Returns:
        out [T, H, Dv] in q1's dtype, and lse1 and lse2 [H, T] float32.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if shapes, devices or values do not fit; the message names the remedy.
    """
    check_branches(q1, q2, k1, k2, v)
    check_lam(lam, q1.shape[0], q1.shape[1], q1.device)
    pack.check_tokens(q1, k1)
    options = checked_options(
        q1.device,
        q1.shape[2],
        pack.documents,
        q1.shape[1],
        select_backend(q1.device, q1.dtype, backend),
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        first_head=first_head,
    )
    operands = Operands(
        pad_head_dim(q1),
        pad_head_dim(q2),
        pad_head_dim(k1),
        None if k2 is k1 else pad_head_dim(k2),
        pad_head_dim(v),
        # lam is expanded to [T, H] by a view, so that autograd sums its gradient.
        lam.to(torch.promote_types(q1.dtype, torch.float32)).expand(q1.shape[:2]),
    )
    if backend == "hopper":
        trained = [x for x in operands[:5] if x is not None]
        require_backend("differential", operands, options, trained)
    out, _, _, lse1, lse2 = differential_attention(operands, pack, options)
    if out.shape[2] != v.shape[2]:
        out = out[..., : v.shape[2]]
    return out, lse1, lse2
