"""dual_chunk_attn_varlen_func: attention with relative positions inside the trained window.

The function builds a Pack from its arguments. Callers that have a Pack, as a model's layers do,
call dual_chunk_attn_pack_func.
"""

from torch import Tensor

from lctrain_kernels import checks
from lctrain_kernels.backend import select_backend
from lctrain_kernels.dual_chunk.checks import check_chunks
from lctrain_kernels.dual_chunk.operators import Operands, dual_chunk_attention
from lctrain_kernels.layout import unit_stride
from lctrain_kernels.options import checked_options
from lctrain_kernels.pack import Pack, checked_shared_pack
from lctrain_kernels.registry import require_backend
from lctrain_kernels.schedule import TileSchedule


def dual_chunk_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    inv_freq: Tensor,
    chunk_size: int,
    local_size: int,
    logit_scale: Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    dropout_seed: int | Tensor | None = None,
    document_ids: Tensor | None = None,
    schedule: TileSchedule | None = None,
    backend: str = "auto",
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Computes causal dual chunk attention over packed documents, with exact gradients.

    The method is that of ChunkLlama, "Training-Free Long-Context Scaling of Large Language Models"
    (arXiv 2402.17463). Every query sees all keys up to its own position. With S = chunk_size,
    L = local_size, c = S - L and r(x) = x mod c, RoPE sees this relative position between query i
    and key j, at most S:

        same chunk of c tokens     r(i) - r(j)
        the chunk before           min(r(i) + c, S) - r(j)
        all earlier chunks         min(2c - 1, S) - r(j)

    Documents of up to S + 1 tokens have the result of plain causal attention.

    One softmax runs over all three ranges of keys, so the gradients are exact. The published code
    merges three attentions by detached weights; its gradients are not exact.

    Args:
        q: Packed queries [T, H, D], float16 or bfloat16, last stride 1, D even and at most 256.
            They are rotated by RoPE in Llama's half-split layout at r(position), not at the
            position itself. The PyTorch path computes float32 and float64.
        k: Packed keys [Tk, Hk, D], rotated by RoPE at r(position); query head h reads key/value
            head h // (H / Hk).
        v: Packed values [Tk, Hk, D].
        cu_seqlens: Cumulative document lengths from 0 to T, [N + 1] int32. Lengths of 0 are legal.
        max_seqlen: Longest document, a Python int.
        inv_freq: RoPE frequencies by which q and k were rotated, [D/2] float32 on q's device, in
            radians per position.
        chunk_size: Largest relative position S, at most the trained window minus one.
        local_size: Distance L, 0 <= L < S, up to which positions stay exact across a chunk
            boundary.
        logit_scale: Positive factor of the logits of each document, [N] float32, or None. It gets
            no gradient; requires_grad must be False.
        dropout_p: Probability of dropping an attention weight, rounded to a multiple of 1/65536.
        softmax_scale: Factor of q.k; D^-0.5 by default.
        return_lse: Whether to return (out, lse) instead of out.
        dropout_seed: Seed of the dropout mask, an int or an int64 tensor of one element on q's
            device. By default, it is drawn from torch's generator of that device.
        document_ids: Ids of the documents for the dropout RNG, [N] int32. By default, a document's
            index in the pack.
        schedule: Schedule that make_schedule returned, on q's device. By default, one is built on
            the device, once per cu_seqlens tensor.
        backend: "auto", "hopper", "triton" or "pytorch". A backend other than "auto" raises an
            error if it does not support the call. On a Hopper GPU "auto" chooses "hopper" for every
            forward and backward that the Hopper kernels support.
        cu_seqlens_k: Cumulative key lengths, [N + 1] int32, if documents have more keys than
            queries, as with a key/value cache. Queries are then the last positions of their
            document. By default, cu_seqlens.
        max_seqlen_k: Most keys of a document; max_seqlen by default.

    Returns:
        out [T, H, D] in q's dtype; with return_lse also lse [H, T] float32, natural logarithm,
        before dropout, differentiable.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if shapes, devices or values do not fit; the message names the remedy.
    """
    checks.check_qkv(q, k, v)
    pack = checked_shared_pack(
        q,
        k,
        cu_seqlens,
        cu_seqlens_k,
        max_seqlen,
        max_seqlen_k,
        document_ids=document_ids,
        schedule=schedule,
    )
    out, lse = dual_chunk_attn_pack_func(
        q,
        k,
        v,
        pack,
        inv_freq=inv_freq,
        chunk_size=chunk_size,
        local_size=local_size,
        logit_scale=logit_scale,
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        dropout_seed=dropout_seed,
        backend=backend,
    )
    return (out, lse) if return_lse else out


def dual_chunk_attn_pack_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pack: Pack,
    *,
    inv_freq: Tensor,
    chunk_size: int,
    local_size: int,
    logit_scale: Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    dropout_seed: int | Tensor | None = None,
    first_head: int = 0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Computes dual_chunk_attn_varlen_func over the documents of a Pack.

    The Pack was validated when it was built, so a call reads none of its values.

    Args:
        q: Packed queries [T, H, D], rotated by RoPE at r(position).
        k: Packed keys [Tk, Hk, D], rotated by RoPE at r(position).
        v: Packed values [Tk, Hk, D].
        pack: Documents of q and k.
        inv_freq: RoPE frequencies [D/2] float32, in radians per position.
        chunk_size: Largest relative position S.
        local_size: Distance L, 0 <= L < S, up to which positions stay exact across a chunk
            boundary.
        logit_scale: Positive factor of the logits of each document, [N] float32, or None.
        dropout_p: Probability of dropping an attention weight.
        softmax_scale: Factor of q.k; D^-0.5 by default.
        dropout_seed: Seed of the dropout mask, an int or an int64 tensor of one element.
        first_head: Index of the call's first query head for the dropout RNG. A rank that holds a
            slice of the heads passes its first one: its mask is then that of these heads in a call
            with all heads.
        backend: Implementation: "auto", "hopper", "triton" or "pytorch".

    Returns:
        out [T, H, D] in q's dtype, and lse [H, T] float32.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if shapes, devices or values do not fit; the message names the remedy.
    """
    checks.check_qkv(q, k, v)
    pack.check_tokens(q, k)
    check_chunks(
        chunk_size, local_size, inv_freq, logit_scale, q.shape[2], pack.documents, q.device
    )
    options = checked_options(
        q.device,
        q.shape[2],
        pack.documents,
        q.shape[1],
        select_backend(q.device, q.dtype, backend, head_dim=q.shape[2]),
        softmax_scale=softmax_scale,
        causal=True,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        first_head=first_head,
    )
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    inv_freq, logit_scale = unit_stride(inv_freq, logit_scale)
    operands = Operands(q, k, v, inv_freq, logit_scale, chunk_size, local_size)
    if backend == "hopper":
        require_backend("dual_chunk", operands, options, (q, k, v))
    out, lse = dual_chunk_attention(operands, pack, options)
    return out, lse
