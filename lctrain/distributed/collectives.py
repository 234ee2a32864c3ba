"""Differentiable collectives on the rows of a tensor: all-to-all, and all-gather."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

PIECE = 2**16  # number of rows whose gradients are added in one operation


def all_to_all(rows: Tensor, sent: Sequence[int], received: Sequence[int], group: Any) -> Tensor:
    """Sends rows to every rank of a group, and receives rows from every rank.

    The backward is the reverse exchange, and needs no saved tensors.

    Args:
        rows: Rows to send, [sum of sent, ...]: those for rank 0 first, then those for rank 1, and
            so on.
        sent: Number of rows to send to each rank.
        received: Number of rows to receive from each rank.
        group: Process group; None for the default one.

    Returns:
        Received rows, [sum of received, ...], those of rank 0 first.
    """
    out: Tensor = _AllToAll.apply(rows, list(sent), list(received), group)
    return out


class Selection(NamedTuple):
    """The rows that a rank selects from the gathered rows of all ranks.

    Attributes:
        longest: Largest number of rows of any rank. Every rank's rows are padded to this number, so
            rank r's rows begin at r * longest in the gathered rows.
        places: Index of every selected row in the gathered rows, [n] int64. A row may be selected
            twice.
        parts: Indices into `places`, 0 to n - 1, divided into int64 tensors. The indices of one
            tensor select different rows, so that the backward can add without collisions.
    """

    longest: int
    places: Tensor
    parts: tuple[Tensor, ...]


def gather_rows(rows: Tensor, selection: Selection, group: Any) -> Tensor:
    """Gathers the rows of all ranks of a group, and selects some of them.

    Memory: the gathered rows of all ranks exist only during this call. The backward holds one
    gradient for each gathered row, in float32 or more. It adds the gradients of the selected rows,
    one part of `selection.parts` after the other, and then sums them over the ranks. The order of
    the additions is the same in every run.

    Args:
        rows: [rows of this rank, ...].
        selection: Rows to select.
        group: Process group; None for the default one.

    Returns:
        The selected rows, [n, ...].
    """
    out: Tensor = _GatherRows.apply(rows, selection, group)
    return out


class _AllToAll(torch.autograd.Function):
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


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, selection: Selection, group: Any) -> Tensor:
        ctx.count, ctx.selection, ctx.group = rows.shape[0], selection, group
        filled = rows.contiguous()
        if rows.shape[0] < selection.longest:
            filled = rows.new_zeros((selection.longest, *rows.shape[1:]))
            filled[: rows.shape[0]] = rows
        count = selection.longest * dist.get_world_size(group)
        gathered = rows.new_empty((count, *rows.shape[1:]))
        dist.all_gather_into_tensor(gathered, filled, group=group)
        return gathered.index_select(0, selection.places)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        selection: Selection = ctx.selection
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        count = selection.longest * dist.get_world_size(ctx.group)
        total = gradient.new_zeros((count, *gradient.shape[1:]), dtype=dtype)
        for part in selection.parts:
            for piece in part.split(PIECE):
                places = selection.places.index_select(0, piece)
                added = gradient.index_select(0, piece).to(dtype)
                total.index_copy_(0, places, added.add_(total.index_select(0, places)))
        own = total.new_empty((selection.longest, *total.shape[1:]))
        dist.reduce_scatter_tensor(own, total, group=ctx.group)
        return own[: ctx.count].to(gradient.dtype), None, None
