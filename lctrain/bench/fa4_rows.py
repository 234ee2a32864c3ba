"""fa4_rows: FlashAttention-4 as an attention function of transformers, for padded rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lctrain.kernels import pad_input, unpad_input

FA4_NAME = "bench_fa4_rows"


def fa4_mask(*_: Any, attention_mask: Tensor | None = None, **__: Any) -> Tensor | None:
    """Mask function for transformers: the padding mask itself, which no host reads.

    transformers' own looks on the host whether there is padding, which a CUDA graph cannot.
    """
    return attention_mask


class KnownPadding(NamedTuple):
    """Where the tokens of rows are, as `unpad_input` returns it.

    Attributes:
        indices: [T] int64, index of each token in the flattened rows.
        ends: [B + 1] int32, cumulative lengths.
        longest: Length of the longest row.
    """

    indices: Tensor
    ends: Tensor
    longest: int


_KNOWN: list[KnownPadding] = []  # one entry within known_padding


@contextmanager
def known_padding(mask: Tensor) -> Iterator[None]:
    """Context manager in which `fa4_rows` takes the padding of a mask [B, S] that is read once.

    A CUDA graph cannot read a mask: that synchronises.
    """
    _KNOWN[:] = [KnownPadding(*unpad_input(mask, mask)[1:4])]
    try:
        yield
    finally:
        _KNOWN.clear()


def fa4_rows(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention function for transformers: FlashAttention-4 on the tokens without padding.

    Args:
        module: The attention layer.
        query: [B, H, S, D].
        key: [B, H, S, D].
        value: [B, H, S, D].
        attention_mask: [B, S], 0 at padding; None without padding.
        scaling: Factor of q.k; None means D^-0.5.
        sliding_window: Number of keys that a query sees on each side, its own key included; None
            for all.

    Returns:
        The output [B, S, H, D], 0 at padding; and None in place of attention weights.
    """
    from flash_attn.cute import flash_attn_varlen_func

    states = [x.transpose(1, 2) for x in (query, key, value)]
    rows, tokens = states[0].shape[:2]
    mask = attention_mask
    if mask is None:
        mask = torch.ones((rows, tokens), dtype=torch.bool, device=query.device)
    known = _KNOWN or [KnownPadding(*unpad_input(states[0][..., 0, 0], mask)[1:4])]
    indices, ends, longest = known[0]
    q, k, v = (x.flatten(0, 1).index_select(0, indices) for x in states)
    side = None if sliding_window is None else sliding_window - 1
    out = flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=ends,
        cu_seqlens_k=ends,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        softmax_scale=scaling,
        causal=False,
        window_size=(side, side),
    )
    out = out[0] if isinstance(out, tuple) else out
    return pad_input(out, indices, rows, tokens), None
