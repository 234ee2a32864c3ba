"""CacheStep: attention of one forward pass over a key/value cache that the caller holds.

All attentions give the same two functions to a CacheStep, which knows where keys are: one for
packed requests, and one for one query per request.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torch import Tensor, nn

if TYPE_CHECKING:
    from lctrain_kernels.pack import Pack

STEP_ARGUMENT = "lctrain_step"
"""Keyword argument by which a CacheStep reaches the layers of a model."""

Packed = Callable[[Tensor, Tensor, Tensor, "Pack"], Tensor]
"""Attention (q [T, H, D], k [Tk, Hk, D], v [Tk, Hk, D], pack) -> [T, H', W] of packed requests."""

Stored = Callable[..., Tensor]
"""Attention (q [N, 1, H, D], k_cache, v_cache, k=, v=, cache_seqlens=, block_table=) -> [N, 1, H',
W] of one query per request, which writes the new keys and values first."""


class StepAttention(NamedTuple):
    """Attention of one layer, for a CacheStep.

    Attributes:
        packed: Attention of packed requests.
        stored: Attention of one query per request.
        heads: Heads H' of the output.
        width: Width W of an output head.
        causal: Whether the layer attends causally.
        windowed: Whether a query sees only a window of keys.
        plans: Whether `stored` takes a plan of make_decode_plan, as the argument `plan`.
        prefix_cost: Time that shared prefixes cost a layer, beyond their reads, in multiples of
            that of flash attention.
    """

    packed: Packed
    stored: Stored
    heads: int
    width: int
    causal: bool = True
    windowed: bool = False
    plans: bool = False
    prefix_cost: float = 1.0


class CacheStep(Protocol):
    """Stores the new keys and values of a forward pass, and attends to the cache.

    A forward pass with the argument STEP_ARGUMENT calls `attend` once per layer, in place of the
    attention of documents. Its mask is a result of `cached_rows`, which keeps the input hook from
    looking for documents. Its position ids count from the first token of each request.
    """

    @property
    def lengths(self) -> Tensor | None:
        """Tokens of each request, [N] integers, which choose the factors of dual chunk attention.

        None stands for the keys so far.
        """
        ...

    def attend(
        self,
        module: nn.Module,
        states: tuple[Tensor, Tensor, Tensor],
        attention: StepAttention,
        arguments: dict[str, Any],
    ) -> Tensor:
        """Returns the output of a layer, [1, T, H', W].

        Args:
            module: The attention layer, whose `layer_idx` names its part of the cache.
            states: Queries of all requests [1, H, T, D], and new keys and values [1, Hk, T, D].
            attention: Attention of the layer.
            arguments: Further keyword arguments of the layer.
        """
        ...
