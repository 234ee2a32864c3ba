"""Computes an attention's backward one key/value head at a time, which takes less memory.

The workspace of a backward, such as dq in float32, then has the size of one key/value head and its
query heads. No head's gradients depend on another head, so those of keys and values have the same
bits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor

_OPTIONS = {"alibi_slopes": -1, "learnable_sink": 0}  # option -> its dimension of query heads
_IS_BY_HEAD: ContextVar[bool] = ContextVar("_IS_BY_HEAD", default=False)


@contextmanager
def backward_by_head() -> Iterator[None]:
    """Context manager for a forward: its attention's backward computes one head at a time.

    Varlen and dual chunk attention follow it; differential attention computes all heads at once.
    """
    token = _IS_BY_HEAD.set(True)
    try:
        yield
    finally:
        _IS_BY_HEAD.reset(token)


def is_by_head() -> bool:
    """Returns whether `backward_by_head` is active."""
    return _IS_BY_HEAD.get()


def run_by_head(
    backward: Callable[..., tuple[Tensor, ...]],
    arguments: Mapping[str, Any],
    heads: Mapping[str, int],
    gradients: Sequence[str],
    free: Collection[str] = (),
) -> list[Tensor]:
    """Runs an attention's backward for one key/value head after the other.

    Args:
        backward: The backward, which takes the values of `arguments` in their order.
        arguments: All arguments of the backward by name; gradients of results have a leading "d".
        heads: Dimension of the heads in operands, results and gradients, by name.
        gradients: Names of what the backward returns.
        free: Names of operands that the gradients of the same name overwrite.

    Returns:
        The results of the backward for all heads.
    """
    sliced = {**heads, **{f"d{name}": dim for name, dim in heads.items()}, **_OPTIONS}
    parts = arguments["v"].shape[heads["v"]]
    wholes: list[Tensor] = []
    for part in range(parts):
        some = dict(arguments)
        for name in sliced.keys() & arguments.keys():
            if arguments[name] is not None:
                some[name] = _part(arguments[name], sliced[name], part, parts)
        some["first_head"] += part * some["q"].shape[heads["q"]]
        pieces = backward(*some.values())
        if not wholes:
            wholes = [
                arguments[name].detach()  # no head reads what another one wrote
                if name in free
                else piece.new_empty(_widened(piece, heads[name], parts))
                for name, piece in zip(gradients, pieces, strict=True)
            ]
        for name, whole, piece in zip(gradients, wholes, pieces, strict=True):
            _part(whole, heads[name], part, parts).copy_(piece)
        del pieces, piece  # before the next head's are computed
    return wholes


def _part(x: Tensor, dim: int, part: int, parts: int) -> Tensor:
    """Returns the heads of one of `parts` equal groups of heads, without a copy."""
    size = x.shape[dim] // parts
    return x.narrow(dim, part * size, size)


def _widened(x: Tensor, dim: int, parts: int) -> list[int]:
    """Returns the shape of x with `parts` times its heads."""
    return [size * parts if place == dim else size for place, size in enumerate(x.shape)]
