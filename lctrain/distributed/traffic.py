"""Computes the bytes that a rank receives from others in one attention layer on a shared pack."""

from __future__ import annotations

from typing import NamedTuple

from lctrain.distributed.context import ContextShard


class AttentionWidths(NamedTuple):
    """How many numbers the tensors of one attention layer have per token, over all heads.

    Attributes:
        queries: Query heads times head dim, summed over all tensors of queries.
        keys: Key/value heads times head dim, summed over all tensors of keys and values.
        output: Query heads times the head dim of values.
    """

    queries: int
    keys: int
    output: int

    @classmethod
    def plain(cls, heads: int, key_heads: int, head_dim: int) -> AttentionWidths:
        """Returns the widths of plain and of dual chunk attention."""
        return cls(heads * head_dim, 2 * key_heads * head_dim, heads * head_dim)


class Received(NamedTuple):
    """Bytes that a rank receives from other ranks, by collective.

    Attributes:
        all_to_all: Bytes of the exchanges of heads.
        all_gather: Bytes of the gathers of keys.
        reduce_scatter: Bytes of the sums of the gradients of keys.
    """

    all_to_all: int = 0
    all_gather: int = 0
    reduce_scatter: int = 0


def received_forward(
    shard: ContextShard, rank: int, widths: AttentionWidths, itemsize: int
) -> Received:
    """Returns the bytes that a rank receives in the forward of an attention layer.

    Args:
        shard: Division of the pack over the ranks.
        rank: Index of the rank in its context group.
        widths: How many numbers the layer's tensors have per token.
        itemsize: Bytes of a number.
    """
    own, others = _tokens(shard, rank)
    heads = shard.heads
    asked = others * (widths.queries + widths.keys) // heads
    answered = own * (heads - 1) * widths.output // heads
    return Received((asked + answered) * itemsize, _gathered(shard, widths) * itemsize)


def received_backward(
    shard: ContextShard, rank: int, widths: AttentionWidths, itemsize: int
) -> Received:
    """Returns the bytes that a rank receives in the backward of an attention layer.

    The arguments are those of `received_forward`. Gradients of gathered keys are summed in float32
    or more.
    """
    own, others = _tokens(shard, rank)
    heads = shard.heads
    asked = others * widths.output // heads
    answered = own * (heads - 1) * (widths.queries + widths.keys) // heads
    summed = _gathered(shard, widths) * max(itemsize, 4)
    return Received((asked + answered) * itemsize, 0, summed)


def _tokens(shard: ContextShard, rank: int) -> tuple[int, int]:
    """Returns the tokens of a rank, and those of the other ranks of its heads group."""
    own = shard.tokens[rank]
    return own, shard.group_tokens[rank // shard.heads] - own


def _gathered(shard: ContextShard, widths: AttentionWidths) -> int:
    """Returns how many numbers a rank receives in the gathers of keys of an attention layer."""
    return (shard.groups - 1) * max(shard.group_tokens) * widths.keys // shard.heads
