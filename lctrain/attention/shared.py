"""attend_shared: attention of one rank's share of a pack, by exchanging heads or gathering keys."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from lctrain.attention.boundaries import Boundaries
from lctrain_kernels.pack import Pack


class Part(NamedTuple):
    """What one call of a kernel computes: a pack of documents, with all heads or this rank's heads.

    Attributes:
        pack: The documents.
        shared: The pack that ranks share, a `lctrain.distributed.shared_pack.SharedPack`; None if
            this rank computes all of it.
        dropout_seed: [1] int64, the seed of the dropout; None draws one.
    """

    pack: Pack
    shared: Any = None
    dropout_seed: Tensor | None = None

    def first_head(self, heads: int) -> int:
        """Returns the index of this part's first head, where the part has `heads` heads."""
        return 0 if self.shared is None else self.shared.place * heads

    def of_heads(self, values: Tensor | None) -> Tensor | None:
        """Returns the entries of this part's heads from values [H]."""
        return values if self.shared is None else self.shared.of_heads(values)

    def of_documents(self, values: Tensor | None) -> Tensor | None:
        """Returns the entries of this part's documents from values [N]."""
        return values if self.shared is None else self.shared.of_documents(values)


Kernel = Callable[..., Tensor]
Split = Callable[[Tensor, Tensor, Tensor], tuple[Sequence[Tensor], Sequence[Tensor]]]


def attend_shared(
    kernel: Kernel,
    split: Split,
    states: tuple[Tensor, Tensor, Tensor],
    per_query: Sequence[Tensor],
    boundaries: Boundaries,
    *,
    dropout_p: float,
    causal: bool,
) -> Tensor:
    """Computes the attention of this rank's tokens of a pack that several ranks share.

    All ranks of the context group must call it.

    Args:
        kernel: Called as kernel(part, *queries, *per_query, *keys) with a Part; returns the output
            [tokens, H, W].
        split: Called as split(q, k, v); returns (queries, keys), the tensors that the kernel takes.
        states: Queries [S, H, W], keys [S, Hk, W] and values [S, Hk, W] of this rank's tokens.
        per_query: Further tensors of the kernel, [S, H'], one number per query and head.
        boundaries: Boundaries of the whole pack, with this rank's share of it.
        dropout_p: Probability of dropping an attention weight.
        causal: Whether attention is causal.

    Returns:
        [S, H, W], zero for the filler of a share without tokens.

    Raises:
        ValueError: if keys are to be gathered for an attention that is not causal, or the heads
            cannot be divided over the ranks.
    """
    from lctrain.distributed.attention import shared_seed
    from lctrain.distributed.exchange import exchange

    share: Any = boundaries.share
    shared, rows = share.shared, states[0].shape[0]
    if shared.selection is not None and not causal:
        raise ValueError(
            "trainer.context_parallel must divide the heads of attention that is not causal, got "
            f"{share.size} ranks and {states[1].shape[1]} key/value heads. Use fewer ranks."
        )
    queries, keys = split(*(tensor[: share.tokens] for tensor in states))
    extra = [tensor[: share.tokens, :, None] for tensor in per_query]
    first, last = len(queries), len(queries) + len(extra)
    seed = shared_seed({"dropout_p": dropout_p}, shared, states[0].device)
    part = Part(shared.pack, shared, seed)

    def attention(*tensors: Tensor) -> Tensor:
        flat = (tensor[..., 0] for tensor in tensors[first:last])
        return kernel(part, *tensors[:first], *flat, *tensors[last:])

    out = exchange(attention, [*queries, *extra], keys, shared)
    return F.pad(out, (0, 0, 0, 0, 0, rows - share.tokens))
