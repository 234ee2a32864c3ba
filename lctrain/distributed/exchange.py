"""Context-parallel attention: the ranks of a shared pack exchange heads, gather keys, or both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lctrain.distributed.collectives import Selection, all_to_all, gather_rows
from lctrain.distributed.context import ContextShard
from lctrain.distributed.shared_pack import SharedPack

Attention = Callable[..., Tensor]


def exchange(
    attention: Attention, queries: Sequence[Tensor], keys: Sequence[Tensor], shared: SharedPack
) -> Tensor:
    """Computes attention for this rank's tokens, with keys and heads from other ranks.

    Within a heads group (see `ContextShard`), ranks exchange heads (Ulysses): one all-to-all per
    tensor and one of the output, and as many in the backward. Between heads groups, ranks gather
    keys: one all-gather per tensor of keys, and one reduce-scatter of its gradient, in float32 or
    more.

    With exchanged heads, results have the same bits as on one rank. With gathered keys, so do the
    output and the gradients of queries; the gradients of keys are sums over heads groups, which
    adds one rounding.

    For the backward, the attention saves as many queries as this rank has, and as many keys, unless
    keys are gathered. With gathered keys, it saves [Tk, Hk / heads, D], where Tk counts the keys
    that this rank's queries need, up to all keys of the pack. Activation checkpointing frees them
    after each layer.

    Args:
        attention: Function from the tensors of queries and keys, on the documents of `shared.pack`
            and a part of the heads, to the output [tokens of the heads group, H / heads, Dv].
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
    asked = [_to_heads(tensor, shared) for tensor in queries]
    found: dict[int, Tensor] = {}
    for tensor in keys:
        if id(tensor) not in found:
            found[id(tensor)] = _all_keys(_to_heads(tensor, shared), shared)
    out = attention(*asked, *(found[id(tensor)] for tensor in keys))
    return _to_tokens(out, shared)


def _all_keys(rows: Tensor, shared: SharedPack) -> Tensor:
    """Gathers the keys of all heads groups, and returns those that this rank's queries need."""
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


def exchange_heads(
    attention: Attention, tensors: Sequence[Tensor], shard: ContextShard, group: Any = None
) -> Tensor:
    """Computes attention on whole documents and a share of the heads (Ulysses).

    Four all-to-all exchanges per call with queries, keys and values, and as many in the backward.
    The result has the bits of one rank.

    Args:
        attention: Function from tensors [T, heads / size, D], in the order of the pack, to the
            output [T, heads / size, D].
        tensors: Queries, keys and values, or the five tensors of differential attention, each
            [tokens of this rank, heads, D]. The number of heads may differ between tensors.
        shard: Division of the pack over the ranks of the group.
        group: Process group; None for the default one.

    Returns:
        Output of this rank's tokens, [tokens of this rank, heads, D].

    Raises:
        ValueError: if the size of the group does not divide the heads of a tensor.
    """
    for tensor in tensors:
        if tensor.shape[1] % shard.size != 0:
            raise ValueError(
                f"shard.size must divide the heads, got {shard.size} ranks and "
                f"{tensor.shape[1]} heads. Exchange keys instead, or use fewer ranks."
            )
    rank = dist.get_rank(group)
    counts, own = list(shard.tokens), shard.tokens[rank]
    order = torch.from_numpy(shard.order).to(tensors[0].device)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    whole = []
    for tensor in tensors:
        parts = tensor.unflatten(1, (shard.size, -1)).transpose(0, 1).flatten(0, 1)
        received = all_to_all(parts, [own] * shard.size, counts, group)
        whole.append(received.index_select(0, place))
    out = attention(*whole).index_select(0, order)
    returned = all_to_all(out, counts, [own] * shard.size, group)
    return returned.unflatten(0, (shard.size, own)).transpose(0, 1).flatten(1, 2)


def exchange_keys(
    attention: Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shard: ContextShard,
    group: Any = None,
) -> Tensor:
    """Computes causal attention of this rank's queries with the keys of all ranks.

    One all-gather of keys and values, and one reduce-scatter of their gradients, in at least
    float32. Every chunk of queries attends to its document up to the chunk's end.

    Args:
        attention: Function (q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k) to the
            output [tokens, H, Dv]. It is causal, and aligns queries to the last keys, as
            `flash_attn_varlen_func` does.
        q: [tokens of this rank, H, D].
        k: [tokens of this rank, Hk, D].
        v: [tokens of this rank, Hk, Dv].
        shard: Division of the pack over the ranks of the group.
        group: Process group; None for the default one.

    Returns:
        Output of this rank's tokens, [tokens of this rank, H, Dv].
    """
    rank = dist.get_rank(group)
    longest = max(shard.tokens)
    found = (torch.from_numpy(part).to(q.device) for part in shard.keys(rank))
    places, *parts = found
    selection = Selection(longest, places, tuple(parts))
    k, v = (gather_rows(tensor, selection, group) for tensor in (k, v))
    chunks = shard.chunks[rank]
    if not chunks:
        # The gradients of other ranks pass through this rank's gather, so it stays in the graph.
        return q.new_empty((0, q.shape[1], v.shape[2])) + 0 * (q.sum() + k.sum() + v.sum())
    lengths_q = [chunk.stop - chunk.start for chunk in chunks]
    lengths_k = [chunk.stop for chunk in chunks]
    ends_q, ends_k = (_cumulative(lengths, q.device) for lengths in (lengths_q, lengths_k))
    return attention(q, k, v, ends_q, ends_k, max(lengths_q), max(lengths_k))


def _cumulative(lengths: Sequence[int], device: torch.device) -> Tensor:
    ends = torch.tensor([0, *lengths]).cumsum(0)
    return ends.to(device=device, dtype=torch.int32)
