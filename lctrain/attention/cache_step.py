"""CacheStep: attention of one forward pass over a key/value cache that the caller holds."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

STEP_ARGUMENT = "lctrain_step"
"""Keyword argument by which a CacheStep reaches the layers of a model."""


class CacheStep(Protocol):
    """Stores the new keys and values of a forward pass, and attends to the cache.

    A forward pass with the argument STEP_ARGUMENT calls `attend` once per layer, in place of the
    attention of documents. Its mask is a result of `cached_rows`, which keeps the input hook from
    looking for documents.
    """

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        causal: bool,
        options: dict[str, Any],
    ) -> Tensor:
        """Returns the output of a layer, [1, T, H, D].

        Args:
            module: The attention layer.
            query: Queries of all requests [1, H, T, D].
            key: New keys [1, Hk, T, D].
            value: New values [1, Hk, T, D].
            causal: Whether the layer attends causally.
            options: Keyword arguments of flash_attn_varlen_func and flash_attn_with_kvcache: scale,
                window, softcap, sink and backend.
        """
        ...
