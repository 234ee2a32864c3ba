"""dual_chunk_attn_varlen_func: attention whose relative positions never exceed what was trained."""

from torch import Tensor

from lctrain_kernels import checks
from lctrain_kernels.backend import select_backend
from lctrain_kernels.dual_chunk.checks import check_chunks
from lctrain_kernels.dual_chunk.operators import Operands, dual_chunk_attention
from lctrain_kernels.layout import unit_stride
from lctrain_kernels.options import checked_options
from lctrain_kernels.pack import checked_pack
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
    """Causal dual chunk attention over packed documents, in one launch, with exact gradients.

    ChunkLlama, "Training-Free Long-Context Scaling of Large Language Models" (arXiv 2402.17463).
    Every query sees all keys before it. With S = chunk_size, L = local_size, c = S - L and r(x) = x
    mod c, the relative position that RoPE sees between query i and key j is r(i) - r(j) inside a
    chunk of c tokens, min(r(i) + c, S) - r(j) towards the chunk before, min(2c - 1, S) - r(j)
    towards all others: never more than S. Documents of up to S + 1 tokens get what plain causal
    attention gives them.

    One softmax runs over all three ranges, so gradients are those of the function (those of the
    published code, which merges three attentions by detached weights, are not).

    Args:
        q: [T, H, D] float16 or bfloat16 with last stride 1, D even and at most 256, rotated by
            RoPE in Llama's half-split layout at r(position), not at the position itself. float32
            and float64 are served by the PyTorch path.
        k: [Tk, Hk, D], rotated likewise; query head h reads head h // (H / Hk).
        v: Packed values [Tk, Hk, D].
        cu_seqlens: Cumulative document lengths from 0 to T, [N + 1] int32. Lengths of 0 are legal.
        max_seqlen: Longest document, a Python int.
        inv_freq: [D/2] float32 on q's device, the frequencies that q and k were rotated by, in
            radians per position.
        chunk_size: S, at most the trained window minus one.
        local_size: L, 0 <= L < S: how far positions stay exact across a chunk's boundary.
        logit_scale: [N] float32, a positive factor of the logits of each document. It has no
            gradient; requires_grad must be False.
        dropout_p: Probability of dropping an attention weight, rounded to a multiple of 1/65536.
        softmax_scale: Factor of q.k; D^-0.5 by default.
        return_lse: Return (out, lse).
        dropout_seed: An int or one int64 element on q's device. Default: drawn from torch's
            generator of that device.
        document_ids: Ids of the documents in the dropout key, [N] int32. By default, a document's
            index in the pack.
        schedule: Schedule of make_schedule, on q's device. Default: built on the device, once per
            cu_seqlens tensor.
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
    pack = checked_pack(
        cu_seqlens,
        cu_seqlens if cu_seqlens_k is None else cu_seqlens_k,
        q.shape[0],
        k.shape[0],
        q.device,
        max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen if max_seqlen_k is None else max_seqlen_k,
        document_ids=document_ids,
        schedule=schedule,
        names=("cu_seqlens", "cu_seqlens_k", "max_seqlen", "max_seqlen_k"),
    )
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
    )
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    inv_freq, logit_scale = unit_stride(inv_freq, logit_scale)
    operands = Operands(q, k, v, inv_freq, logit_scale, chunk_size, local_size)
    if backend == "hopper":
        require_backend("dual_chunk", operands, options, (q, k, v))
    out, lse = dual_chunk_attention(operands, pack, options)
    return (out, lse) if return_lse else out
