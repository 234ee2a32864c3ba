"""tiled: runs a module for a few tokens (a tile) at a time, forward and backward.

Under activation checkpointing a layer's recomputation ends once it has the tensors that the
backward reads. `tiled` saves its input before it computes, and nothing else. So if nothing after
the module is saved, the recomputation does not run the module, and each tile runs once there, in
its own backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from lctrain.memory.randomness import RandomState

_WHOLE = 2  # tiles on the meta device that run in full before those that are alike


def tiled(
    module: nn.Module,
    run: Callable[[Tensor], Tensor],
    x: Tensor,
    tokens: int,
    again: Callable[[], Any],
) -> Tensor:
    """Returns a module's output for x [..., S, E], computed tile by tile.

    The gradient of a weight is summed over the tiles in the weight's dtype.

    Args:
        module: Module whose trained parameters get gradients.
        run: The module's forward of one tile [..., s, E].
        x: Inputs.
        tokens: Number of tokens of a tile.
        again: Function that returns a context manager for `run` in the backward, such as autocast.
    """
    places = [
        (owner, name)
        for owner in module.modules()
        for name, parameter in owner._parameters.items()
        if parameter is not None and parameter.requires_grad
    ]
    if not (places or x.requires_grad):
        return _outputs(run, x, tokens)
    anchor = torch.empty(0, device=x.device, requires_grad=True)  # a node for any x
    kept = _Kept.apply(x, anchor)
    work = _Work(run, tokens, places, again, kept.grad_fn, RandomState(x), x.requires_grad)
    return _Tiles.apply(work, kept, *(owner._parameters[name] for owner, name in places))


@dataclass(frozen=True)
class _Work:
    """What both passes of `tiled` share; its arguments, and the node that saves the input."""

    run: Callable[[Tensor], Tensor]
    tokens: int
    places: list[tuple[nn.Module, str]]
    again: Callable[[], Any]
    node: Any
    random: RandomState
    needs_gradient: bool

    @contextmanager
    def parameters(self) -> Iterator[list[Tensor]]:
        """Context manager with the trained parameters as leaves of their own.

        Hooks of the parameters run once, for the sum over the tiles.
        """
        before = [owner._parameters[name] for owner, name in self.places]
        leaves = {id(one): nn.Parameter(one.detach()) for one in before if one is not None}
        try:
            for (owner, name), one in zip(self.places, before, strict=True):
                owner._parameters[name] = leaves[id(one)]
            yield list(leaves.values())
        finally:
            for (owner, name), one in zip(self.places, before, strict=True):
                owner._parameters[name] = one


class _Kept(torch.autograd.Function):
    """Saves the input of the tiles, and returns it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor) -> Tensor:  # type: ignore[override]
        """Returns a view of x [..., S, E]."""
        ctx.save_for_backward(x)
        ctx.set_materialize_grads(False)  # no zeros for an input without a gradient
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> Any:  # type: ignore[override]
        """Passes the gradient of x on."""
        return gradient, None


class _Tiles(torch.autograd.Function):
    """Computes the tiles one after the other."""

    @staticmethod
    def forward(ctx: Any, work: _Work, x: Tensor, *parameters: Tensor) -> Tensor:  # type: ignore[override]
        """Returns the output [..., S, F] for x [..., S, E]."""
        ctx.work = work
        return _outputs(work.run, x, work.tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        """Returns the gradients of x and of the parameters."""
        work: _Work = ctx.work
        (x,) = work.node.saved_tensors  # the recomputation of a checkpoint runs here
        of_x = torch.empty_like(x) if work.needs_gradient else None
        tiles = x.split(work.tokens, dim=-2)
        gradients = gradient.split(work.tokens, dim=-2)
        same: Any = lambda saved: saved  # noqa: E731
        with work.random.again(), work.parameters() as leaves, work.again():
            for index in _computed(x, len(tiles)):
                tile = tiles[index].detach().requires_grad_(work.needs_gradient)
                # Hooks, as of a checkpoint: operations choose the kernels of the forward.
                with torch.enable_grad(), saved_tensors_hooks(same, same):
                    out = work.run(tile)
                if out.requires_grad:  # not if it reads nothing that is trained
                    torch.autograd.backward(out, gradients[index])  # adds up leaves' gradients
                del out
                if of_x is not None:
                    of_x.narrow(-2, index * work.tokens, tile.shape[-2]).copy_(tile.grad)
                del tile
        return None, of_x, *_in_order(work.places, [leaf.grad for leaf in leaves])


def _outputs(run: Callable[[Tensor], Tensor], x: Tensor, tokens: int) -> Tensor:
    """Returns the output [..., S, F] of all tiles of x [..., S, E], without autograd history."""
    tiles = x.split(tokens, dim=-2)
    out: Any = None
    with torch.no_grad():
        for index in _computed(x, len(tiles)):
            found = run(tiles[index])
            if out is None:
                out = found.new_empty((*x.shape[:-1], found.shape[-1]))
            out.narrow(-2, index * tokens, found.shape[-2]).copy_(found)
            del found  # before the next tile's
    return out


def _in_order(places: list[tuple[nn.Module, str]], sums: list[Tensor | None]) -> list[Any]:
    """Returns a gradient for each place; that of a shared parameter only once."""
    ids = list(dict.fromkeys(id(owner._parameters[name]) for owner, name in places))
    left = dict(zip(ids, sums, strict=True))
    return [left.pop(id(owner._parameters[name]), None) for owner, name in places]


def _computed(x: Tensor, count: int) -> list[int]:
    """Returns the numbers of the tiles to compute: all, but on the meta device only some.

    There all whole tiles take the same memory, one after the other.
    """
    if x.device.type != "meta" or count <= _WHOLE:
        return list(range(count))
    return [*range(_WHOLE), count - 1]
