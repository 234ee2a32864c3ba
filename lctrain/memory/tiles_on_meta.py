"""forward_on_meta: runs a tiled MLP on the meta device, for the memory plan.

All whole tiles take the same memory, one after the other. So only the first two tiles and the last
two are computed. A stand-in allocates what the tiles between them leave: their outputs, and in the
backward the gradients of their inputs. The backward peaks at the second tile, or at the first,
where the gradient of the whole output is no longer needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_COMPUTED = 4  # tiles: the first two, and the last two, of which the last may be shorter


def forward_on_meta(mlp: Callable[[Tensor], Tensor], x: Tensor, tokens: int) -> Tensor:
    """Returns an MLP's output for x [..., S, E], and allocates as if it were computed tile by tile.

    Args:
        mlp: The MLP's forward of one tile.
        x: Inputs [..., S, E] on the meta device.
        tokens: Number of tokens of a tile.
    """
    between = -(-x.shape[-2] // tokens) - _COMPUTED
    if between < 1:
        tiles = x.split(tokens, dim=-2)
        return torch.cat([checkpoint(mlp, tile, use_reentrant=False) for tile in tiles], dim=-2)
    last = x.shape[-2] - (between + 3) * tokens
    parts = x.split([tokens, tokens, between * tokens, tokens, last], dim=-2)
    found: list[Tensor] = []
    for index, part in enumerate(parts):
        if index == 2:
            found.append(_StandIn.apply(part, found[0].shape[-1], found[0].dtype))
        else:
            found.append(checkpoint(mlp, part, use_reentrant=False))
    return torch.cat(found, dim=-2)


class _StandIn(torch.autograd.Function):
    """Allocates the output of an MLP, and in the backward the gradient of its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, width: int, dtype: torch.dtype) -> Tensor:  # type: ignore[override]
        """Returns an empty tensor [..., S, width] for x [..., S, E]."""
        ctx.like = x.shape, x.dtype
        return x.new_empty((*x.shape[:-1], width), dtype=dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        """Returns an empty gradient [..., S, E]."""
        shape, dtype = ctx.like
        return gradient.new_empty(shape, dtype=dtype), None, None
