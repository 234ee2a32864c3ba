"""The torch.library operators of a decode call: they keep torch.compile's graph whole."""

from __future__ import annotations

from typing import Any, get_type_hints

import torch
from torch import Tensor

from lctrain_kernels.decode import pytorch
from lctrain_kernels.decode.structures import (
    DecodeOptions,
    DecodePlan,
    KVCache,
    NewTokens,
    PackedQueries,
    SharedPrefixes,
)
from lctrain_kernels.fused_operator import define_operator

_KINDS = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    float: "float",
    int: "SymInt",
    bool: "bool",
    str: "str",
}
_PARTS: dict[str, Any] = {"cache": KVCache, "new": NewTokens, "options": DecodeOptions}
_SIZES = [len(part._fields) for part in _PARTS.values()]


def append_tokens(cache: KVCache, new: NewTokens, backend: str) -> None:
    """Writes the new keys, rotated, and values into the cache, in place.

    Args:
        cache: Cache, before the new tokens.
        new: New tokens; nothing is done without any.
        backend: "pytorch", or another name for the kernels.
    """
    if new.k is not None:
        _append(*cache, *new, backend)


def decode_attention(
    q: Tensor,
    cache: KVCache,
    new: NewTokens,
    options: DecodeOptions,
    backend: str,
    *,
    plan: DecodePlan | None = None,
    longest: int | None = None,
    packed: PackedQueries | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes the attention of queries over a cache that holds the new tokens already.

    Args:
        q: Queries [B, Sq, H, D], or [T, H, D] if packed.
        cache: Cache; its seqlens do not count the new tokens.
        new: New tokens.
        options: Mask, scale and the other options.
        backend: "pytorch", or another name for the kernels.
        plan: List of the splits, or None.
        longest: Upper bound of the keys of a request, or None.
        packed: Numbers of queries, if packed.

    Returns:
        out in the shape of q, in its dtype or with options.wide at least float32; lse [B, H, Sq],
        or [H, T] if packed.
    """
    listed: tuple[Any, ...] = (None, 0, 0)
    shared: tuple[Any, ...] = (None, None, None, 0, 0)
    if plan is not None:
        listed = plan.work, plan.max_splits, plan.split_size
        shared = plan.shared or shared
    found: tuple[Tensor, Tensor] = _attend(
        *(q, *cache, *new, *options, backend, *listed, *shared, longest),
        *(packed or (None, 0)),
    )
    return found


def _append_here(*arguments: Any) -> None:
    size = _SIZES[0]
    cache, new, backend = KVCache(*arguments[:size]), NewTokens(*arguments[size:-1]), arguments[-1]
    if backend == "pytorch":
        pytorch.append_tokens(cache, new)
        return
    from lctrain_kernels.decode import launch

    launch.append_tokens(cache, new)


def _attend_here(q: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    first, second, third = _SIZES[0], sum(_SIZES[:2]), sum(_SIZES)
    cache, new = KVCache(*arguments[:first]), NewTokens(*arguments[first:second])
    options = DecodeOptions(*arguments[second:third])
    backend, work, max_splits, split_size = arguments[third : third + 4]
    *shared, longest, cu_seqlens_q, longest_q = arguments[third + 4 :]
    packed = None if cu_seqlens_q is None else PackedQueries(cu_seqlens_q, longest_q)
    if backend == "pytorch":
        return pytorch.decode_attention(q, cache, new, options, packed)
    from lctrain_kernels.decode import launch

    plan = None
    if work is not None:
        prefixes = None if shared[0] is None else SharedPrefixes(*shared)
        plan = DecodePlan(work, max_splits, split_size, 0, new.tokens, -1, shared=prefixes)
    q = q if q.stride(-1) == 1 else q.contiguous()
    return launch.decode_attention(q, cache, new, options, plan, longest, packed)


def _append_fake(*arguments: Any) -> None:
    return None


def _attend_fake(q: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    options = DecodeOptions(*arguments[sum(_SIZES[:2]) : sum(_SIZES)])
    heads = q.shape[-2]
    rows = (heads, q.shape[0]) if q.dim() == 3 else (q.shape[0], heads, q.shape[1])
    out = q.new_empty(q.shape, dtype=dtype if options.wide else q.dtype)
    return out, q.new_empty(rows, dtype=dtype)


def _declared(part: str, written: bool = False) -> str:
    """Returns the operator's arguments for the fields of a part; `written` marks k and v."""
    words = []
    for name, kind in get_type_hints(_PARTS[part]).items():
        alias = f"({'ab'[name == 'v']}!)" if written and name in ("k", "v") else ""
        words.append(f"{_KINDS[kind]}{alias} {part}_{name}")
    return ", ".join(words)


_append = define_operator(
    f"decode_append({_declared('cache', written=True)}, {_declared('new')}, str backend) -> ()",
    _append_here,
    _append_fake,
)
_attend = define_operator(
    "decode_attention(Tensor q, "
    + ", ".join(map(_declared, _PARTS))
    + ", str backend, Tensor? work, SymInt max_splits, SymInt split_size, Tensor? prefix, "
    "Tensor? members, Tensor? groups, SymInt longest_prefix, SymInt most_members, "
    "SymInt? longest, Tensor? cu_seqlens_q, SymInt longest_q) -> (Tensor, Tensor)",
    _attend_here,
    _attend_fake,
)
