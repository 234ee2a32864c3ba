"""Context-parallel attention: several ranks share one pack, by exchanging heads or keys.

Both functions take any attention on packed tokens, such as those of `lctrain.kernels`, and need
nothing of Lightning. Every rank has the tokens that ContextShard gives it. With a dropout above 0
the masks would differ from those of one rank, so it is not supported here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lctrain.distributed.context import ContextShard

Attention = Callable[..., Tensor]


def exchange_heads(
    attention: Attention, tensors: Sequence[Tensor], shard: ContextShard, group: Any = None
) -> Tensor:
    """Computes attention with all tokens and a part of the heads on each rank (Ulysses).

    Four all-to-all exchanges per call with queries, keys and values, and as many in the backward.
    The result has the bits of one rank.

    Args:
        attention: Function from the input tensors, each [T, heads / size, D] in the order of the
            pack, to the output [T, heads / size, D].
        tensors: Queries, keys and values, or the five inputs of differential attention, each
            [tokens of this rank, heads, D] in the order of the rank's chunks. The number of heads
            may differ between tensors.
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
        received = _AllToAll.apply(parts, [own] * shard.size, counts, group)
        whole.append(received.index_select(0, place))
    out = attention(*whole).index_select(0, order)
    returned = _AllToAll.apply(out, counts, [own] * shard.size, group)
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
        attention: Causal attention function (q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
            max_seqlen_k) -> output [tokens, H, Dv]. Its queries are the last tokens of the key
            sequence, as in `flash_attn_varlen_func`.
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
    keys = torch.from_numpy(shard.keys(rank, longest)).to(q.device)
    k, v = (_Gather.apply(tensor, longest, group).index_select(0, keys) for tensor in (k, v))
    chunks = shard.chunks[rank]
    if not chunks:
        # The backward's collective needs every rank, so a rank without tokens stays in the graph.
        return q.new_empty((0, q.shape[1], v.shape[2])) + 0 * (q.sum() + k.sum() + v.sum())
    lengths_q = [chunk.stop - chunk.start for chunk in chunks]
    lengths_k = [chunk.stop for chunk in chunks]
    ends_q, ends_k = (_cumulative(lengths, q.device) for lengths in (lengths_q, lengths_k))
    return attention(q, k, v, ends_q, ends_k, max(lengths_q), max(lengths_k))


def _cumulative(lengths: Sequence[int], device: torch.device) -> Tensor:
    ends = torch.tensor([0, *lengths]).cumsum(0)
    return ends.to(device=device, dtype=torch.int32)


class _AllToAll(torch.autograd.Function):
    """All-to-all of rows: every rank sends some of its rows to every rank."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        out = rows.new_empty((sum(received), *rows.shape[1:]))
        dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        return _AllToAll.apply(gradient, ctx.received, ctx.sent, ctx.group), None, None, None


class _Gather(torch.autograd.Function):
    """All-gather of rows, in which every rank's rows are padded to `longest` rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, longest: int, group: Any) -> Tensor:
        ctx.count, ctx.longest, ctx.group = rows.shape[0], longest, group
        filled = rows.new_zeros((longest, *rows.shape[1:]))
        filled[: rows.shape[0]] = rows
        out = rows.new_empty((longest * dist.get_world_size(group), *rows.shape[1:]))
        dist.all_gather_into_tensor(out, filled, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32)).contiguous()
        own = wide.new_empty((ctx.longest, *wide.shape[1:]))
        dist.reduce_scatter_tensor(own, wide, group=ctx.group)
        return own[: ctx.count].to(gradient.dtype), None, None
