"""flash_attn_with_kvcache: attention over a cache of keys and values, as in FlashAttention."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lctrain_kernels.decode.call import checked_call
from lctrain_kernels.decode.checks import check_no_gradients, check_numbers
from lctrain_kernels.decode.operators import append_tokens, decode_attention
from lctrain_kernels.decode.plan_checks import check_plan, check_shared_pages
from lctrain_kernels.decode.structures import DecodeOptions, DecodePlan, NewTokens
from lctrain_kernels.layout import unit_stride
from lctrain_kernels.options import (
    check_head_tensors,
    check_softcap_and_scale,
    resolve_window,
)

SPLITS = ("fixed", "exact")


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    learnable_sink: Tensor | None = None,
    split: str = "fixed",
    plan: DecodePlan | None = None,
    max_seqlen_k: int | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Appends new keys and values to a cache in place, and attends to the cache.

    Positional arguments are those of FlashAttention's function of this name. Masks are aligned at
    the bottom right: the last query of a request sees its last key. The call has no backward.

    Shapes: B requests, Sq queries each, H query heads, Hk key/value heads, head dim D.

    The kernels split the keys of a request among programs, and merge the results by lse in the
    order of the keys. With split="fixed" a split has a fixed number of keys. It begins at a
    multiple of that number, counted from the request's first key. A query's bits then do not depend
    on the other requests, the number of queries in the call, the page size, or the padding. With
    split="exact" one program computes all keys, with the tile of the portable training kernel. The
    bits are those of flash_attn_varlen_func(..., backend="triton") on the same documents. With a
    softcap on a GPU, both are equal up to rounding only.

    Args:
        q: Queries [B, Sq, H, D], float16 or bfloat16. The PyTorch path, on CPUs, computes float32
            and float64.
        k_cache: Keys [rows, S, Hk, D], or [pages, page, Hk, D] with a block_table.
        v_cache: Values, in the shape of k_cache. If k and v are given, no other operand may share
            the memory of a cache; interleaved views of one storage do not. Pages of both may lie in
            one pool, such as pool[:-1] and pool[1:], if block_table names every second one.
        k: New keys [B, S_new, Hk, D], or None. They are written to positions cache_seqlens,
            cache_seqlens + 1, ... of the cache before the attention.
        v: New values [B, S_new, Hk, D], given with k.
        rotary_cos: Cosines [positions, R / 2], in q's dtype: the first R columns of q and k are
            rotated. Key i is rotated by position cache_seqlens + i. So is query i if the call is
            causal or has a window; otherwise every query is rotated by cache_seqlens.
        rotary_sin: Sines, in the shape of rotary_cos.
        cache_seqlens: Tokens that the cache holds before the call, [B] int32 or one int; None for a
            full cache. -S_new marks a request without keys, for which nothing is written.
        cache_batch_idx: Row of k_cache of each request, [B] int32; by default, request b has row b.
            Requests may share a row that the call does not write to.
        cache_leftpad: First token of each request in the cache, [B] int32; 0 by default.
        block_table: Page numbers of each request, [B, pages per request] int32. Entries beyond a
            request's length are not read. Pages have 16, 32, 64, 128 or 256 tokens.
        softmax_scale: Factor of q.k; D^-0.5 by default.
        causal: Whether a query sees only the keys up to its own position.
        window_size: (left, right) keys around a query's own position; -1 is unbounded.
        softcap: A softcap c > 0 replaces a logit x by c tanh(x / c); 0 turns it off.
        rotary_interleaved: Whether columns 2i and 2i + 1 are a pair, instead of i and i + R / 2.
        alibi_slopes: ALiBi slopes, [H] or [B, H] float32.
        num_splits: 0 for the fixed split size; 1 for one program per request and head; more for a
            split size of the cache's length divided by num_splits.
        return_softmax_lse: Whether to return (out, lse).
        learnable_sink: Logit [H] that takes part in every softmax of its head and has no value.
        split: "fixed" or "exact".
        plan: Plan of make_decode_plan, made once per step for all layers. It leaves out splits that
            no query sees. Without one, calls with lengths on a GPU make their own.
        max_seqlen_k: Upper bound of the lengths after the call, a Python int, so that no program is
            started for keys beyond; the length of the cache by default.
        backend: "auto", "triton" or "pytorch".

    Returns:
        out [B, Sq, H, D] in q's dtype; with return_softmax_lse also lse [B, H, Sq] float32, natural
        logarithm. A query that sees no key has out = 0 and lse = -inf, or the logit of its sink.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if shapes, devices or values do not fit. Lengths and page numbers in tensors on
            a GPU are read only if LCTRAIN_CHECK_CACHE=1 is set, since reading them synchronises.
            Without it, a new token beyond the cache is not written.
    """
    check_no_gradients(
        "flash_attn_with_kvcache",
        "train with flash_attn_varlen_func",
        q=q,
        k_cache=k_cache,
        v_cache=v_cache,
        k=k,
        v=v,
        alibi_slopes=alibi_slopes,
        learnable_sink=learnable_sink,
    )
    call = checked_call(
        q,
        k_cache,
        v_cache,
        NewTokens(k, v, rotary_cos, rotary_sin, rotary_interleaved),
        cache_seqlens,
        cache_batch_idx,
        cache_leftpad,
        block_table,
        max_seqlen_k,
        backend,
    )
    cache, new = call.cache, call.new
    requests, heads, head_dim = q.shape[0], q.shape[2], q.shape[3]
    check_numbers(window_size, q.device)
    check_softcap_and_scale(softcap, softmax_scale)
    check_head_tensors(requests, heads, q.device, alibi_slopes, learnable_sink)
    _check_splits(split, num_splits)
    _, left, right = resolve_window(window_size, causal)
    if plan is not None:
        check_plan(plan, q, cache, new, left)
        check_shared_pages(plan.shared, cache)
    slopes, sink = unit_stride(alibi_slopes, learnable_sink)
    options = DecodeOptions(
        softmax_scale=head_dim**-0.5 if softmax_scale is None else float(softmax_scale),
        window_left=left,
        window_right=right,
        softcap=float(softcap),
        alibi_slopes=slopes,
        learnable_sink=sink,
        split=split,
        num_splits=num_splits,
    )
    append_tokens(cache, new, call.backend)
    out, lse = decode_attention(
        q, cache, new, options, call.backend, plan=plan, longest=call.longest
    )
    return (out, lse) if return_softmax_lse else out


def _check_splits(split: str, num_splits: int) -> None:
    if split not in SPLITS:
        raise ValueError(
            f"split must be one of {', '.join(SPLITS)}, got {split!r}. 'fixed' is the default."
        )
    if not isinstance(num_splits, int) or isinstance(num_splits, bool) or num_splits < 0:
        raise ValueError(
            f"num_splits must be an int of at least 0, got {num_splits!r}. 0 takes a fixed size."
        )
    if num_splits > 1 and split == "exact":
        raise ValueError(
            f"num_splits must be 0 or 1 with split='exact', got {num_splits}. It does not split."
        )
