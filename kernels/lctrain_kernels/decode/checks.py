"""Argument checks of flash_attn_with_kvcache. Each error message names the remedy.

Shapes, dtypes and devices are always checked. Values (lengths, page tables) are read where that
needs no synchronisation, on a CPU, and on a GPU if LCTRAIN_CHECK_CACHE=1 is set.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from lctrain_kernels.checks import check_floating
from lctrain_kernels.decode.structures import KVCache, NewTokens

SWITCH = "LCTRAIN_CHECK_CACHE"
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
    if torch.is_grad_enabled() and (q.requires_grad or k_cache.requires_grad):
        raise ValueError(
            "flash_attn_with_kvcache has no backward, and q or k_cache requires a gradient. Call "
            "it under torch.no_grad(), or train with flash_attn_varlen_func."
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


def check_metadata(q: Tensor, cache: KVCache, new: NewTokens) -> None:
    """Raises unless lengths, indices and page table fit the cache and the new tokens.

    Args:
        q: Queries [B, Sq, H, D].
        cache: Cache of the call.
        new: New tokens of the call.
    """
    requests = q.shape[0]
    vectors = {
        "cache_seqlens": cache.seqlens,
        "cache_batch_idx": cache.batch_index,
        "cache_leftpad": cache.leftpad,
    }
    for name, vector in vectors.items():
        if vector is not None:
            _check_int32(name, vector, q)
            if tuple(vector.shape) != (requests,):
                raise ValueError(
                    f"{name} must have shape [{requests}], got {tuple(vector.shape)}. Pass one "
                    "number per request."
                )
    if cache.block_table is not None:
        _check_int32("block_table", cache.block_table, q)
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
        page = cache.page
        if not MIN_PAGE <= page <= MAX_PAGE or page & (page - 1):
            raise ValueError(
                f"k_cache must have pages of 16, 32, 64, 128 or 256 tokens, got {page}. Allocate "
                "it as [pages, page, heads, D]."
            )
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
    if _reads_values(q.device):
        _check_values(cache, new.tokens)


def _reads_values(device: torch.device) -> bool:
    if device.type == "cpu":
        return True
    if os.environ.get(SWITCH, "0") != "1":
        return False
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


def _check_values(cache: KVCache, new_tokens: int) -> None:
    """Raises unless lengths fit the capacity, and every page that a request uses exists."""
    lengths = cache.seqlens.tolist()
    pads = [0] * len(lengths) if cache.leftpad is None else cache.leftpad.tolist()
    for request, (length, pad) in enumerate(zip(lengths, pads, strict=True)):
        if length < 0 or length + new_tokens > cache.capacity:
            raise ValueError(
                f"cache_seqlens[{request}] must be from 0 to {cache.capacity - new_tokens}, got "
                f"{length}: the cache holds {cache.capacity} tokens of a request, and "
                f"{new_tokens} are appended. Nothing was written; make the cache longer."
            )
        if not 0 <= pad <= length:
            raise ValueError(
                f"cache_leftpad[{request}] must be from 0 to {length}, got {pad}. Padding is part "
                "of cache_seqlens."
            )
        if cache.block_table is not None:
            used = -(-(length + new_tokens) // cache.page)
            pages = cache.block_table[request, :used].tolist()
            wrong = [page for page in pages if not 0 <= page < cache.k.shape[0]]
            if wrong:
                raise ValueError(
                    f"block_table[{request}] must name pages from 0 to {cache.k.shape[0] - 1}, got "
                    f"{wrong[0]} among the first {used}. Nothing was written; allocate a page."
                )
        elif cache.batch_index is not None:
            row = int(cache.batch_index[request])
            if not 0 <= row < cache.k.shape[0]:
                raise ValueError(
                    f"cache_batch_idx[{request}] must be from 0 to {cache.k.shape[0] - 1}, got "
                    f"{row}. Nothing was written."
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


def _check_int32(name: str, tensor: Tensor, q: Tensor) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype != torch.int32:
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be an int32 tensor, got {got}. Call .to(torch.int32).")
    if tensor.device != q.device:
        raise ValueError(
            f"{name} must be on the device of q, {q.device}, got {tensor.device}. Move it."
        )
