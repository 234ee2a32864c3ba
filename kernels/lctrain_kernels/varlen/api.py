"""flash_attn_varlen_func and flash_attn_func: attention with FlashAttention-2's signatures.

Both build a Pack from their arguments. Callers that have a Pack, as a model's layers do, call
flash_attn_pack_func.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lctrain_kernels import checks
from lctrain_kernels.backend import select_backend
from lctrain_kernels.options import AttentionOptions, checked_options
from lctrain_kernels.pack import Pack, checked_pack, rows_pack
from lctrain_kernels.padding import pad_head_dim
from lctrain_kernels.registry import require_backend
from lctrain_kernels.schedule import TileSchedule
from lctrain_kernels.varlen.operators import Operands, varlen_attention
from lctrain_kernels.varlen.probabilities import attention_probabilities


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    seqused_k: Tensor | None = None,
    return_lse: bool = False,
    learnable_sink: Tensor | None = None,
    dropout_seed: int | Tensor | None = None,
    document_ids: Tensor | None = None,
    schedule: TileSchedule | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """Computes attention over packed documents. Positional arguments are FlashAttention-2's.

    Masks are aligned at the bottom right: query i of a document with Lq queries and Lk keys has
    position i + Lk - Lq. A query that sees no key has out = 0, zero gradients and lse = -inf, or
    the logit of its sink. Documents may have length 0.

    With block_table or seqused_k, the decode kernels compute the call, as for
    flash_attn_with_kvcache: it has no backward, no dropout and no schedule. Calls of more than 16
    queries per document have the bits of this function on contiguous keys with backend="triton".
    With a softcap on a GPU, both are equal up to rounding only.

    Shapes: T packed queries, Tk packed keys, N documents, H query heads, Hk key/value heads, head
    dim D.

    Args:
        q: Packed queries [T, H, D], float16 or bfloat16, any strides with last stride 1. The
            PyTorch path computes float32 and float64.
        k: Packed keys [Tk, Hk, D]; query head h reads key/value head h // (H / Hk). With a
            block_table, the pool of pages [pages, page, Hk, D].
        v: Packed values, in the shape of k.
        cu_seqlens_q: [N + 1] int32, cumulative query lengths from 0 to T.
        cu_seqlens_k: [N + 1] int32, cumulative key lengths from 0 to Tk. It may be None if both
            block_table and seqused_k are given.
        max_seqlen_q: Longest query length, a Python int. The decode kernels use it, and the Hopper
            backward chooses by it how it adds dq; a larger number costs speed only.
        max_seqlen_k: Longest key length, a Python int. Only the decode kernels use it.
        dropout_p: Probability of dropping an attention weight, rounded to a multiple of 1/65536.
        softmax_scale: Factor of q.k; D^-0.5 by default.
        causal: Whether query i sees only the keys up to its own position.
        window_size: (left, right) keys that a query sees before and after its own position; two
            ints or an int32 device tensor [2]; -1 is unbounded.
        softcap: A softcap c > 0 replaces a logit x by c tanh(x / c); 0 turns it off.
        alibi_slopes: ALiBi slopes, [H] or [N, H] float32: -slope * |i + Lk - Lq - j| is added to
            the logit of query i and key j. They get no gradient, as in FlashAttention-2.
        deterministic: Whether the backward must give the same bits in every run. If False, the last
            bits of dq from the Hopper kernels may differ; out, lse, dk and dv do not.
        return_attn_probs: Whether to return (out, lse, weights), for debugging. The weights
            [N, H, max_seqlen_q, max_seqlen_k] are stored in full, negative where dropout dropped
            them. Computing them reads the lengths, so it synchronises with a GPU.
        block_table: Page numbers of each document, [N, pages per document] int32. Entries beyond a
            document's keys are not read. Pages have 16, 32, 64, 128 or 256 tokens.
        seqused_k: Number of keys of each document that are used, its first ones, [N] int32; all by
            default.
        return_lse: Whether to return (out, lse) instead of out.
        learnable_sink: Logit [H] that takes part in every softmax of its head and has no value. It
            gets a gradient.
        dropout_seed: Seed of the dropout mask, an int or an int64 tensor of one element on q's
            device. By default, it is drawn from torch's generator of that device.
        document_ids: Ids of the documents for the dropout RNG, [N] int32. By default, a document's
            index in the pack.
        schedule: Schedule that make_schedule returned, on q's device. By default, one is built on
            the device, once per cu_seqlens tensor.
        backend: "auto", "hopper", "triton" or "pytorch". A backend other than "auto" raises an
            error if it does not support the call. On a Hopper GPU "auto" chooses "hopper" for every
            forward and backward that the Hopper kernels support.

    Returns:
        out [T, H, D] in q's dtype; with return_lse also lse [H, T] float32, natural logarithm,
        before dropout, differentiable.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if shapes, devices or values do not fit; the message names the remedy.
    """
    if block_table is not None or seqused_k is not None:
        from lctrain_kernels.decode.packed import packed_cache_attention

        _refuse_training(dropout_p, return_attn_probs, schedule)
        out, lse = packed_cache_attention(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            block_table,
            seqused_k,
            softmax_scale=softmax_scale,
            causal=causal,
            window_size=window_size,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            learnable_sink=learnable_sink,
            backend=backend,
        )
        return (out, lse) if return_lse else out
    checks.check_qkv(q, k, v)
    if cu_seqlens_k is None:
        raise TypeError(
            "cu_seqlens_k must be a torch.Tensor, got None. Only a call with both block_table and "
            "seqused_k has none."
        )
    pack = checked_pack(
        cu_seqlens_q,
        cu_seqlens_k,
        q.shape[0],
        k.shape[0],
        q.device,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        document_ids=document_ids,
        schedule=schedule,
    )
    out, lse, options = _attend(
        q,
        k,
        v,
        pack,
        backend,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        alibi_slopes=alibi_slopes,
        learnable_sink=learnable_sink,
        deterministic=deterministic,
    )
    if return_attn_probs:
        return out, lse, attention_probabilities(Operands(q, k, v), pack, options)
    return (out, lse) if return_lse else out


def flash_attn_pack_func(
    q: Tensor, k: Tensor, v: Tensor, pack: Pack, *, backend: str = "auto", **options: Any
) -> tuple[Tensor, Tensor]:
    """Computes flash_attn_varlen_func over the documents of a Pack.

    The Pack was validated when it was built, so a call reads none of its values.

    Args:
        q: Packed queries [T, H, D].
        k: Packed keys [Tk, Hk, D].
        v: Packed values [Tk, Hk, D].
        pack: Documents of q and k.
        backend: Implementation: "auto", "hopper", "triton" or "pytorch".
        **options: Keyword arguments of `lctrain_kernels.options.checked_options`, among them
            `first_head`, which a rank with a slice of the heads passes.

    Returns:
        out [T, H, D] in q's dtype, and lse [H, T] float32.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if shapes, devices or values do not fit; the message names the remedy.
    """
    checks.check_qkv(q, k, v)
    pack.check_tokens(q, k)
    return _attend(q, k, v, pack, backend, **options)[:2]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    return_lse: bool = False,
    learnable_sink: Tensor | None = None,
    dropout_seed: int | Tensor | None = None,
    document_ids: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """Computes attention over a batch of rows of equal length, with FlashAttention-2's signature.

    Each row is one document of flash_attn_varlen_func, which describes the arguments in full.

    Args:
        q: Queries [B, S, H, D].
        k: Keys [B, Sk, Hk, D].
        v: Values [B, Sk, Hk, D].
        dropout_p: Probability of dropping an attention weight.
        softmax_scale: Factor of q.k; D^-0.5 by default.
        causal: Whether a query sees only the keys up to its own position, aligned at the bottom
            right if S and Sk differ.
        window_size: (left, right) keys around a query's own position; -1 is unbounded.
        softcap: A softcap c > 0 replaces a logit x by c tanh(x / c); 0 turns it off.
        alibi_slopes: ALiBi slopes, [H] or [B, H] float32, or None.
        deterministic: Whether the backward must give the same bits in every run.
        return_attn_probs: Whether to return (out, lse, weights [B, H, S, Sk]), for debugging.
        return_lse: Whether to return (out, lse) instead of out.
        learnable_sink: Logit of the attention sink of each head, [H], or None.
        dropout_seed: Seed of the dropout mask, an int or an int64 tensor of one element.
        document_ids: Ids of the rows for the dropout RNG, [B] int32; by default, the row's index.
        backend: Implementation: "auto", "hopper", "triton" or "pytorch".

    Returns:
        out [B, S, H, D] in q's dtype; with return_lse also lse [B, H, S] float32.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if shapes, devices or values do not fit; the message names the remedy.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor) or tensor.dim() != 4:
            shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(
                f"{name} must have shape [batch, tokens, heads, head_dim], got {shape}. "
                "Call flash_attn_varlen_func for packed documents."
            )
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        raise ValueError(
            f"q, k and v must have one batch size, got {q.shape[0]}, {k.shape[0]} and {v.shape[0]}."
        )
    batch, length_q, length_k = q.shape[0], q.shape[1], k.shape[1]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    checks.check_qkv(q, k, v)
    pack = rows_pack(batch, length_q, length_k, q.device, document_ids)
    out, lse, options = _attend(
        q,
        k,
        v,
        pack,
        backend,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        alibi_slopes=alibi_slopes,
        learnable_sink=learnable_sink,
        deterministic=deterministic,
    )
    out = out.unflatten(0, (batch, length_q))
    lse = lse.unflatten(1, (batch, length_q)).transpose(0, 1)
    if return_attn_probs:
        return out, lse, attention_probabilities(Operands(q, k, v), pack, options)
    return (out, lse) if return_lse else out


def _refuse_training(dropout_p: float, return_attn_probs: bool, schedule: object) -> None:
    given = {
        "dropout_p": dropout_p,
        "return_attn_probs": return_attn_probs,
        "schedule": schedule is not None,
    }
    for name, value in given.items():
        if value:
            raise ValueError(
                f"{name} must be off with block_table or seqused_k, got {name} on: the decode "
                "kernels are for inference. Gather the keys into contiguous k and v instead."
            )


def _attend(
    q: Tensor, k: Tensor, v: Tensor, pack: Pack, backend: str, **arguments: Any
) -> tuple[Tensor, Tensor, AttentionOptions]:
    """Checks the options of a call, and runs the attention.

    The keyword arguments are those of `checked_options`.

    Returns:
        out [T, H, D], lse [H, T] float32, and the call's AttentionOptions.
    """
    head_dim = q.shape[2]
    options = checked_options(
        q.device,
        head_dim,
        pack.documents,
        q.shape[1],
        select_backend(q.device, q.dtype, backend, head_dim=head_dim),
        **arguments,
    )
    operands = Operands(pad_head_dim(q), pad_head_dim(k), pad_head_dim(v))
    if backend == "hopper":
        require_backend("varlen", operands, options, operands)
    out, lse = varlen_attention(operands, pack, options)
    return (out if out.shape[2] == head_dim else out[..., :head_dim]), lse, options
