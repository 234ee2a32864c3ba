"""Attention of new tokens over a filled key/value cache: a DynamicCache or a StaticCache.

`cached_rows` says where a row's keys begin and end in the cache: the padding on the left, and the
number of tokens, padding counted. Such a tensor, [2, B, 1, 1] int32, replaces the padding mask.
transformers passes a mask of four dimensions on as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lctrain.attention.compute_dtype import compute_dtype

MOST_QUERIES = 16
"""Queries of a call for which a DynamicCache is read by the decode kernels; more take varlen's."""


def cached_rows(
    mask: Tensor | None, batch: int, length: int | Tensor, device: torch.device | str
) -> Tensor | None:
    """Returns the range of each row's keys in a cache, [2, B, 1, 1] int32.

    The result is None if a row has padding between or after its tokens. Reading that costs one
    synchronisation.

    Args:
        mask: [B, tokens] bool, True at tokens that are not padding; None if there is no padding.
        batch: Number of rows B.
        length: Number of tokens that the cache holds, padding and new tokens counted; columns of
            the mask from there on are not read.
        device: Device of the result.
    """
    lengths = torch.as_tensor(length, device=device).to(torch.int32).expand(batch)
    if mask is None:
        return torch.stack((torch.zeros_like(lengths), lengths))[..., None, None]
    column = torch.arange(mask.shape[1], device=device)
    real = mask.to(device) & (column < lengths[:, None])
    first = torch.where(real.any(1), real.int().argmax(1), lengths).to(torch.int32)
    whole = real.sum(1) == lengths - first
    if not torch.compiler.is_compiling() and not bool(whole.all()):
        return None
    return torch.stack((first, lengths))[..., None, None]


def left_padded_rows(
    mask: Tensor | None, batch: int, length: int | Tensor, device: torch.device | str
) -> Tensor:
    """Returns the result of cached_rows, whose arguments it takes.

    Raises:
        ValueError: if a row has padding between or after its tokens.
    """
    rows = cached_rows(mask, batch, length, device)
    if rows is None:
        raise ValueError(
            "padding must be on the left with a cache of fixed size, got padding after a token. "
            "Set the tokenizer's padding_side to 'left', or use a DynamicCache."
        )
    return rows


def is_cached_rows(mask: Tensor | None) -> bool:
    """Returns whether the mask of a layer is a result of cached_rows."""
    return mask is not None and mask.dtype == torch.int32 and mask.dim() == 4


def attend_cached(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor | None,
    exact: bool,
    options: dict[str, Any],
) -> Tensor:
    """Computes causal attention of the last S tokens of each row over the cache.

    Args:
        query: [B, H, S, D].
        key: Keys of the cache [B, Hk, Sk, D], the new ones included.
        value: Values [B, Hk, Sk, D].
        rows: Result of cached_rows; None if every row has all Sk keys.
        exact: Whether the longest row has all Sk keys, as in a DynamicCache.
        options: Keyword arguments of flash_attn_with_kvcache: scale, window, softcap, sink and
            backend.

    Returns:
        [B, S, H, D] in the dtype of `value`, or in autocast's if `value` is float32; zero at
        queries before the first key of their row.
    """
    from lctrain_kernels import flash_attn_with_kvcache

    (q, k, v), places = cache_arguments(query, key, value, rows, exact)
    out = flash_attn_with_kvcache(q, k, v, causal=True, **places, **options)
    assert isinstance(out, Tensor)
    return out


def cache_arguments(
    query: Tensor, key: Tensor, value: Tensor, rows: Tensor | None, exact: bool
) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
    """Returns the operands (q, k_cache, v_cache) of the decode functions, and their places.

    The arguments are those of attend_cached.
    """
    places: dict[str, Any] = {"max_seqlen_k": key.shape[2]} if exact else {}
    if rows is not None:
        places |= {"cache_leftpad": rows[0].flatten(), "cache_seqlens": rows[1].flatten()}
    dtype = compute_dtype(value)
    q, k, v = (x.transpose(1, 2).to(dtype) for x in (query, key, value))
    return (q, k, v), places
