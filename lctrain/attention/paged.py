"""Attention over the paged key/value cache of transformers' continuous batching."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lctrain.attention.cached import is_cached_rows
from lctrain.attention.spec import ATTENTION_NAMES

PAGED_CACHE = "PagedAttentionCache"
"""Class name of transformers' paged cache."""


def paged_cache(arguments: Mapping[str, Any]) -> Any:
    """Returns the paged cache among a call's arguments; None if there is none.

    Args:
        arguments: Keyword arguments of a model or a layer.
    """
    cache = arguments.get("cache")
    return cache if type(cache).__name__ == PAGED_CACHE else None


def layers_read_cache(
    model: nn.Module, inputs: Mapping[str, Any], implementation: str, by_length: bool
) -> bool:
    """Returns whether the layers find the keys of a call themselves.

    They do with a paged cache, and if the mask says where the keys lie in a cache of fixed size.

    Args:
        model: The model, named in the message.
        inputs: Keyword arguments of the model.
        implementation: Name of its attention in transformers.
        by_length: Whether its RoPE frequencies depend on the lengths of the documents.

    Raises:
        ValueError: if the attention or the frequencies do not fit such a cache.
    """
    paged, mask = paged_cache(inputs) is not None, inputs.get("attention_mask")
    if not paged and not (isinstance(mask, Tensor) and is_cached_rows(mask)):
        return False
    if implementation != ATTENTION_NAMES["flash"] or by_length:
        what = "continuous batching" if paged else "a cache of fixed size"
        raise ValueError(
            f"{what} must come with attention='flash' and RoPE frequencies that do not depend on "
            f"lengths, got {implementation} in {type(model).__name__}. Call generate() with a "
            "DynamicCache instead."
        )
    return True


def attend_paged(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    arguments: dict[str, Any],
    options: dict[str, Any],
) -> Tensor:
    """Writes new keys and values into the paged cache, and attends to the cache.

    transformers has two layouts of a batch. With a block table, every request has one query, and
    the kernel writes the new keys itself. Otherwise, the cache returns the keys of all requests as
    one pack.

    Args:
        module: The attention layer, whose `layer_idx` names its part of the cache.
        query: [1, H, T, D], the queries of all requests.
        key: New keys [1, Hk, T, D].
        value: New values [1, Hk, T, D].
        arguments: Keyword arguments of the layer: `cache`, `cu_seq_lens_q/k`, `max_length_q/k`,
            `block_table`, `read_index` and `write_index`. The cache changes them.
        options: Keyword arguments of both kernels: scale, window, softcap, sink and backend.

    Returns:
        [1, T, H, D].

    Raises:
        ValueError: if values have another head dim than keys.
    """
    if value.shape[-1] != key.shape[-1]:
        raise ValueError(
            "continuous batching must have values of the keys' head dim, got "
            f"{value.shape[-1]} and {key.shape[-1]}. Call generate() instead."
        )
    from lctrain_kernels import flash_attn_varlen_func, flash_attn_with_kvcache

    key, value = arguments.pop("cache").update(
        key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=arguments
    )
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    cu_seqlens_k = arguments["cu_seq_lens_k"]
    table = arguments.get("block_table")
    if table is None:
        cu_seqlens_q = arguments["cu_seq_lens_q"]
        covered = int(cu_seqlens_q[-1]) if q.device.type == "cpu" else len(q)
        out = flash_attn_varlen_func(
            q[:covered],
            k,
            v,
            cu_seqlens_q.int(),
            cu_seqlens_k.int(),
            arguments["max_length_q"],
            arguments["max_length_k"],
            causal=True,
            **options,
        )
        assert isinstance(out, Tensor)
        padded = out.new_zeros(q.shape)
        padded[:covered] = out
        return padded[None]
    requests = table.shape[0]  # the queries beyond belong to no request
    out = flash_attn_with_kvcache(
        q[:requests, None],
        arguments["k_cache"],
        arguments["v_cache"],
        k[:requests, None],
        v[:requests, None],
        cache_seqlens=cu_seqlens_k.diff().int() - 1,  # -1 for a padded request: it has no key
        block_table=table.int(),
        causal=True,
        **options,
    )
    assert isinstance(out, Tensor)
    return out.transpose(0, 1)
