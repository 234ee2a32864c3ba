"""Context-parallel attention: the ranks of a shared pack exchange heads, gather keys, or both."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor

from lctrain.distributed.collectives import all_to_all, gather_rows
from lctrain.distributed.shared_pack import SharedPack

Attention = Callable[..., Tensor]


def exchange(
    attention: Attention, queries: Sequence[Tensor], keys: Sequence[Tensor], shared: SharedPack
) -> Tensor:
    """Computes attention for this rank's tokens, with keys and heads from other ranks.

    Heads groups are described in `ContextShard`; `heads` is the number of ranks in one.

    - Within a heads group, ranks exchange heads (Ulysses): one all-to-all for each tensor and one
      for the output, and as many in the backward.
    - Between heads groups, ranks gather keys: one all-gather for each tensor of keys, and one
      reduce-scatter of its gradient, in float32 or more.

    Rounding: if ranks only exchange heads, all results are bit-equal to those of one rank. If ranks
    gather keys, the output and the gradients of queries are, too. The gradients of keys are then
    sums over heads groups, which round once more.

    Memory: for the backward the attention saves

    - queries [tokens of the heads group, H / heads, D], as many elements as this rank's own;
    - keys of the same number of tokens; or, if ranks gather keys, [Tk, Hk / heads, D], where Tk
      counts the keys that queries of the heads group see.

    Activation checkpointing frees both after each layer.

    Args:
        attention: Called as attention(*queries, *keys). The tensors belong to the documents of
            `shared.pack`, with 1 / heads of their heads. It returns [tokens of the heads group,
            H / heads, Dv].
        queries: Tensors [tokens of this rank, H, D]. H may differ between tensors.
        keys: Tensors [tokens of this rank, Hk, D]. A tensor that occurs twice is exchanged once.
        shared: The shared pack, as this rank sees it.

    Returns:
        Output of this rank's tokens, [tokens of this rank, H, Dv].

    Raises:
        ValueError: if a tensor has other tokens than this rank, or the size of a heads group does
            not divide its heads.
    """
    _check(queries, keys, shared)
    asked = [_filled(_to_heads(tensor, shared), shared) for tensor in queries]
    found: dict[int, Tensor] = {}
    for tensor in keys:
        if id(tensor) not in found:
            found[id(tensor)] = _all_keys(_to_heads(tensor, shared), shared)
    out = attention(*asked, *(found[id(tensor)] for tensor in keys))
    return _to_tokens(out[: sum(_counts(shared)[1])], shared)


def _filled(rows: Tensor, shared: SharedPack) -> Tensor:
    """Returns the rows; or one row of zeros if there are no rows, which kernels refuse."""
    missing = shared.pack.total_q - rows.shape[0]
    return F.pad(rows, (0, 0, 0, 0, 0, missing)) if missing else rows


def _all_keys(rows: Tensor, shared: SharedPack) -> Tensor:
    """Gathers the keys of all heads groups, and returns those that this heads group's queries see.

    If ranks gather no keys, it returns `rows`.
    """
    if shared.selection is None:
        return rows
    return gather_rows(rows, shared.selection, shared.groups.keys)


def _to_heads(rows: Tensor, shared: SharedPack) -> Tensor:
    """Exchanges heads: [tokens of this rank, H, D] -> [tokens of the heads group, H / heads, D]."""
    size, (sent, received) = shared.shard.heads, _counts(shared)
    if size == 1:
        return rows
    parts = rows.unflatten(1, (size, -1)).transpose(0, 1).flatten(0, 1)
    return all_to_all(parts, sent, received, shared.groups.heads)


def _to_tokens(out: Tensor, shared: SharedPack) -> Tensor:
    """Exchanges back: [tokens of the heads group, H / heads, D] -> [tokens of this rank, H, D]."""
    size, (sent, received) = shared.shard.heads, _counts(shared)
    if size == 1:
        return out
    parts = all_to_all(out, received, sent, shared.groups.heads)
    return parts.unflatten(0, (size, -1)).transpose(0, 1).flatten(1, 2)


def _counts(shared: SharedPack) -> tuple[list[int], list[int]]:
    """Returns how many rows `_to_heads` sends to each rank, and how many it receives."""
    shard, first = shared.shard, shared.rank - shared.place
    own = shard.tokens[shared.rank]
    return [own] * shard.heads, list(shard.tokens[first : first + shard.heads])


def _check(queries: Sequence[Tensor], keys: Sequence[Tensor], shared: SharedPack) -> None:
    own, size = shared.shard.tokens[shared.rank], shared.shard.heads
    for tensor in (*queries, *keys):
        if tensor.shape[0] != own:
            raise ValueError(
                f"tensors must hold the {own} tokens of rank {shared.rank}, got {tensor.shape[0]}. "
                "Select the tokens shard.indices(rank) of the pack."
            )
        if tensor.shape[1] % size != 0:
            raise ValueError(
                f"the ranks of a heads group must divide the heads, got {size} ranks and "
                f"{tensor.shape[1]} heads. Gather keys instead (heads=1), or use fewer ranks."
            )
