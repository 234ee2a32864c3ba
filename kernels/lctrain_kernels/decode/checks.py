"""Argument checks of the decode functions. Each error message names the remedy.

Shapes, dtypes and devices are always checked. Values (lengths, page tables) are read where that
needs no synchronisation, on a CPU, and on a GPU if LCTRAIN_CHECK_CACHE=1 is set.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor

from lctrain_kernels.checks import check_floating, reads_values
from lctrain_kernels.decode.structures import KVCache, NewTokens
from lctrain_kernels.options import check_window
from lctrain_kernels.overlap import meeting_rows, repeats_memory, share_memory

MIN_PAGE, MAX_PAGE = 16, 256


def check_tensors(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    """Raises unless q is [B, Sq, H, D] and both caches are [rows or pages, tokens, Hk, D].

    All need one dtype and device, a last stride of 1, and H a multiple of Hk.
    """
    for name, tensor in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        check_floating(name, tensor)
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} must have four dimensions [batch or pages, tokens, heads, head_dim], got "
                f"{tuple(tensor.shape)}. Reshape it."
            )
        _check_like(name, tensor, q, "q")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.shape[-1] > 1 and cache.stride(-1) != 1:
            raise ValueError(
                f"{name} must have a last stride of 1, got strides {cache.stride()}. The call "
                "writes into it, so it makes no copy; lay it out as [pages, tokens, heads, D]."
            )
    if k_cache.shape != v_cache.shape:
        raise ValueError(
            f"k_cache and v_cache must have one shape, got {tuple(k_cache.shape)} and "
            f"{tuple(v_cache.shape)}. Allocate both alike."
        )
    if q.shape[3] != k_cache.shape[3] or q.shape[3] < 1:
        raise ValueError(
            f"q and k_cache must have one head dim of at least 1, got {q.shape[3]} and "
            f"{k_cache.shape[3]}. Check the layout [B, S, H, D]."
        )
    heads, heads_kv = q.shape[2], k_cache.shape[2]
    if heads_kv == 0 or heads == 0 or heads % heads_kv:
        raise ValueError(
            f"query heads must be a multiple of key/value heads, got {heads} and {heads_kv}. "
            "Check the layout [B, S, H, D]."
        )


def check_no_gradients(function: str, remedy: str, **tensors: Tensor | None) -> None:
    """Raises if autograd records and an operand, given by its name, requires a gradient.

    Args:
        function: Name of the function, for the message.
        remedy: What a caller who needs gradients does, for the message.
        **tensors: Operands by name.
    """
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            raise ValueError(
                f"{function} has no backward, and {name} requires a gradient. Call it under "
                f"torch.no_grad(), or {remedy}."
            )


def check_backend(backend: str) -> None:
    """Raises if the Hopper kernels are named: the decode kernels are portable."""
    if backend == "hopper":
        raise ValueError(
            "backend must be auto, triton or pytorch, got backend='hopper', which has no decode "
            "kernels. Pass backend='auto'."
        )


def check_numbers(window_size: object, device: torch.device) -> None:
    """Raises unless a window is two ints."""
    check_window(window_size, device)  # type: ignore[arg-type]
    if isinstance(window_size, Tensor):
        raise TypeError(
            "window_size must be two ints for the decode kernels, got a tensor. Pass (left, right) "
            "as Python ints."
        )


def check_new_tokens(q: Tensor, k_cache: Tensor, new: NewTokens, has_seqlens: bool) -> None:
    """Raises unless k and v are [B, S_new, Hk, D] and cos and sin [positions, R / 2], or None.

    Args:
        q: Queries [B, Sq, H, D].
        k_cache: Keys of the cache.
        new: New tokens of the call.
        has_seqlens: Whether the caller gave cache_seqlens.
    """
    if (new.k is None) != (new.v is None):
        raise ValueError("k and v must be given together, got one of them. Pass both or neither.")
    if (new.cos is None) != (new.sin is None):
        raise ValueError(
            "rotary_cos and rotary_sin must be given together, got one of them. Pass both."
        )
    if new.k is not None and not has_seqlens:
        raise ValueError(
            "cache_seqlens must be given with k and v, got None. Pass the lengths before the new "
            "tokens."
        )
    expected = (q.shape[0], k_cache.shape[2], k_cache.shape[3])
    given = [] if new.k is None or new.v is None else [("k", new.k), ("v", new.v)]
    for name, tensor in given:
        check_floating(name, tensor)
        _check_like(name, tensor, q, "q")
        shape = tuple(tensor.shape)
        if len(shape) != 4 or (shape[0], *shape[2:]) != expected or shape != given[0][1].shape:
            raise ValueError(
                f"{name} must have shape [{expected[0]}, new tokens, {expected[1]}, "
                f"{expected[2]}], got {shape}. k and v have the heads of the cache."
            )
    if new.cos is None or new.sin is None:
        return
    if new.k is None:
        raise ValueError(
            "rotary_cos must come with new k and v, got none. Rotate q before the call instead."
        )
    for name, table in (("rotary_cos", new.cos), ("rotary_sin", new.sin)):
        check_floating(name, table)
        _check_like(name, table, q, "q")
        if table.dim() != 2 or table.shape != new.cos.shape or not 0 < new.rotary <= q.shape[3]:
            raise ValueError(
                f"{name} must have shape [positions, R / 2] with R at most {q.shape[3]}, got "
                f"{tuple(table.shape)}. Pass one column per rotated pair of columns."
            )


def check_longest(max_seqlen_k: object) -> None:
    """Raises unless max_seqlen_k is a Python int of at least 0, or None."""
    if max_seqlen_k is None:
        return
    if not isinstance(max_seqlen_k, (int, torch.SymInt)) or max_seqlen_k < 0:
        raise ValueError(
            f"max_seqlen_k must be a Python int of at least 0, got {max_seqlen_k!r}. Pass an upper "
            "bound, or None."
        )


def check_bound(longest: int | None, keys: int, whose: str) -> None:
    """Raises if max_seqlen_k, unless None, is below a number of keys."""
    if longest is not None and keys > longest:
        raise ValueError(
            f"max_seqlen_k must be at least {keys}, the keys of {whose}, got {longest}. Pass an "
            "upper bound, or None."
        )


def check_stored(stored: object, capacity: int, new_tokens: int) -> None:
    """Raises unless cache_seqlens is an int, and the cache has room for the new tokens.

    Args:
        stored: Tokens that the cache holds of every request.
        capacity: Most tokens of a request.
        new_tokens: Tokens that the call appends to each request.
    """
    if not isinstance(stored, int) or isinstance(stored, bool):
        raise TypeError(
            "cache_seqlens must be an int, an int32 tensor or None, got "
            f"{type(stored).__name__}. Pass torch.tensor(lengths, dtype=torch.int32)."
        )
    if not 0 <= stored <= capacity - new_tokens:
        raise _does_not_fit("cache_seqlens", stored, capacity, new_tokens)


def _does_not_fit(name: str, stored: int, capacity: int, new_tokens: int) -> ValueError:
    if stored < 0 <= capacity - new_tokens:
        return ValueError(
            f"{name} must be at least 0, got {stored}. Nothing was written; pass the tokens that "
            f"the cache holds before the call, or {-new_tokens} for a request without keys."
        )
    if capacity < new_tokens:
        return ValueError(
            f"k_cache must have room for the {new_tokens} new tokens of a request, got "
            f"{capacity}. Nothing was written; make the cache longer, or block_table wider."
        )
    return ValueError(
        f"{name} must be from 0 to {capacity - new_tokens}, got {stored}: the cache holds "
        f"{capacity} tokens of a request, and {new_tokens} are appended. Nothing was written; make "
        "the cache longer."
    )


def check_metadata(
    q: Tensor,
    cache: KVCache,
    new: NewTokens,
    longest: int | None = None,
) -> None:
    """Raises unless lengths, indices and page table fit the cache and the new tokens.

    Args:
        q: Queries [B, Sq, H, D].
        cache: Cache of the call.
        new: New tokens of the call.
        longest: max_seqlen_k of the call.
    """
    requests = q.shape[0]
    if new.tokens and not torch.compiler.is_compiling() and q.device.type != "meta":
        _check_memory(q, cache, new)
    vectors = {
        "cache_seqlens": cache.seqlens,
        "cache_batch_idx": cache.batch_index,
        "cache_leftpad": cache.leftpad,
    }
    for name, vector in vectors.items():
        if vector is not None:
            check_int32(name, vector, q.device)
            if tuple(vector.shape) != (requests,):
                raise ValueError(
                    f"{name} must have shape [{requests}], got {tuple(vector.shape)}. Pass one "
                    "number per request."
                )
    if cache.block_table is not None:
        check_int32("block_table", cache.block_table, q.device)
        if cache.block_table.dim() != 2 or cache.block_table.shape[0] != requests:
            raise ValueError(
                f"block_table must have shape [{requests}, pages per request], got "
                f"{tuple(cache.block_table.shape)}. Pass one row per request."
            )
        if cache.batch_index is not None:
            raise ValueError(
                "cache_batch_idx must be None with a block_table, got a tensor. Choose the rows of "
                "block_table instead."
            )
        check_page("k_cache", cache.page)
    elif cache.batch_index is None and cache.k.shape[0] < requests:
        raise ValueError(
            f"k_cache must have a row per request ({requests}), got {cache.k.shape[0]}. Pass "
            "cache_batch_idx to name the rows."
        )
    if new.cos is not None and new.cos.shape[0] < cache.capacity:
        raise ValueError(
            f"rotary_cos must have a row per token of the cache ({cache.capacity}), got "
            f"{new.cos.shape[0]}. Build longer tables."
        )
    if reads_values(q.device):
        check_values(cache, new.tokens, longest)


def _check_memory(q: Tensor, cache: KVCache, new: NewTokens) -> None:
    """Raises unless every element that new tokens are written to is that of one token and head."""
    caches = (("k_cache", cache.k), ("v_cache", cache.v))
    for name, side in caches:
        if repeats_memory(side):
            raise ValueError(
                f"{name} must be no expanded tensor if k and v are given, got strides "
                f"{side.stride()}. Requests would overwrite each other's tokens; clone it."
            )
    found = [("k_cache", "v_cache")] if _caches_overlap(cache) else []
    others = (("q", q), ("k", new.k), ("v", new.v))
    for name, side in caches:
        for other, tensor in others:
            if tensor is not None and share_memory(side, tensor):
                found.append((name, other))
    for name, other in found:
        raise ValueError(
            f"{name} and {other} must not overlap if k and v are given, got tensors that share "
            f"memory. The new tokens would overwrite {other}; clone it."
        )


def _caches_overlap(cache: KVCache) -> bool:
    """Returns whether the two caches share memory in a way that no page table can avoid.

    Pages of keys and of values may lie in one pool by turns, as in transformers' paged cache. Both
    caches are views of the whole pool then, and the page table names other pages than those of the
    other cache; see check_values.
    """
    if not share_memory(cache.k, cache.v):
        return False
    if cache.block_table is None or cache.k.stride() != cache.v.stride():
        return True
    return 0 in meeting_rows(cache.k, cache.v)


def check_values(cache: KVCache, new_tokens: int, longest: int | None) -> None:
    """Raises unless lengths fit the capacity, and every page that a request uses exists."""
    lengths = cache.seqlens.tolist()
    pads = [0] * len(lengths) if cache.leftpad is None else cache.leftpad.tolist()
    rows = [] if cache.batch_index is None else cache.batch_index.tolist()
    written: set[int] = set()
    writers: dict[int, int] = {}
    used_pages: list[tuple[int, list[int]]] = []
    for request, (length, pad) in enumerate(zip(lengths, pads, strict=True)):
        if length + new_tokens == 0 and pad == 0:
            continue  # a request without keys, with which a batch is padded
        if length < 0 or length + new_tokens > cache.capacity:
            name = f"cache_seqlens[{request}]"
            raise _does_not_fit(name, length, cache.capacity, new_tokens)
        check_bound(longest, length + new_tokens, f"request {request}")
        if not 0 <= pad <= length:
            raise ValueError(
                f"cache_leftpad[{request}] must be from 0 to {length}, got {pad}. Padding is part "
                "of cache_seqlens."
            )
        if cache.block_table is not None:
            used = -(-(length + new_tokens) // cache.page)
            pages = cache.block_table[request, :used].tolist()
            wrong = [page for page in pages if not 0 <= page < cache.k.shape[0]]
            if wrong and not cache.k.shape[0]:
                raise ValueError(
                    "k_cache must have at least one page, got none. Nothing was written; allocate "
                    "it as [pages, page, heads, D]."
                )
            if wrong:
                raise ValueError(
                    f"block_table[{request}] must name pages from 0 to {cache.k.shape[0] - 1}, got "
                    f"{wrong[0]} among the first {used}. Nothing was written; allocate a page."
                )
            used_pages.append((request, pages))
            for page in pages[length // cache.page :] if new_tokens else ():
                writers.setdefault(page, request)
        elif rows:
            row = rows[request]
            if new_tokens and row in written:
                raise ValueError(
                    f"cache_batch_idx must name a row once if k and v are given, got {row} twice. "
                    "Requests would overwrite each other's tokens; nothing was written."
                )
            written.add(row)
            if not 0 <= row < cache.k.shape[0]:
                raise ValueError(
                    f"cache_batch_idx[{request}] must be from 0 to {cache.k.shape[0] - 1}, got "
                    f"{row}. Nothing was written; name a row of k_cache."
                )
    for request, pages in used_pages:
        for page in pages:
            if (writer := writers.get(page, request)) != request:
                raise ValueError(
                    f"block_table must name a page for one request if its new tokens are written "
                    f"to it, got page {page} for {writer} and {request}. Request {writer} would "
                    "overwrite the other's tokens; nothing was written. Copy the page first."
                )
    if writers:
        _check_pool(cache, {page for _, pages in used_pages for page in pages}, writers)


def _check_pool(cache: KVCache, used: Collection[int], written: Iterable[int]) -> None:
    """Raises if a page of one cache that is written to is a page of the other that is used.

    Args:
        cache: A paged cache.
        used: Pages of all requests.
        written: Pages that get new tokens.
    """
    shifts = meeting_rows(cache.k, cache.v)
    for page in written if shifts else ():
        for other in (page + sign * shift for shift in shifts for sign in (1, -1)):
            if other in used:
                raise ValueError(
                    "block_table must name pages whose keys and values share no memory, got pages "
                    f"{page} and {other} of caches that lie in one pool. The new keys of one would "
                    "overwrite values of the other; nothing was written. Give keys and values "
                    "pages of their own."
                )


def check_page(name: str, page: int) -> None:
    """Raises unless the tokens of a page are a power of two from 16 to 256."""
    if not MIN_PAGE <= page <= MAX_PAGE or page & (page - 1):
        raise ValueError(
            f"{name} must have pages of 16, 32, 64, 128 or 256 tokens, got {page}. Allocate "
            "it as [pages, page, heads, D]."
        )


def _check_like(name: str, tensor: Tensor, other: Tensor, other_name: str) -> None:
    if tensor.dtype != other.dtype:
        raise TypeError(
            f"{name} must have the dtype of {other_name}, {other.dtype}, got {tensor.dtype}. Cast "
            "one of them."
        )
    if tensor.device != other.device:
        raise ValueError(
            f"{name} must be on the device of {other_name}, {other.device}, got {tensor.device}. "
            "Move it."
        )


def check_int32(name: str, tensor: object, device: torch.device) -> None:
    """Raises unless an argument is an int32 tensor on a device."""
    if not isinstance(tensor, Tensor) or tensor.dtype != torch.int32:
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be an int32 tensor, got {got}. Call .to(torch.int32).")
    if tensor.device != device:
        raise ValueError(
            f"{name} must be on the device of q, {device}, got {tensor.device}. Move it."
        )
