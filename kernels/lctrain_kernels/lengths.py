"""read_lengths: lengths of documents that the caller gives on the CPU, as a tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def read_lengths(name: str, lengths: Tensor | Sequence[int]) -> Tensor:
    """Returns lengths as [N] int64 on the CPU.

    Args:
        name: Name of the argument, for messages.
        lengths: Integers, as a sequence, an array or a tensor on the CPU.

    Raises:
        TypeError: if they are no integers, such as the booleans of a mask; or on another device.
    """
    try:
        given = lengths if isinstance(lengths, Tensor) else torch.tensor(list(lengths))
    except (TypeError, ValueError) as error:
        got = type(lengths).__name__
        raise TypeError(f"{name} must be a list of ints, got {got}: {error}. Pass ints.") from None
    if given.device.type != "cpu":
        raise TypeError(
            f"{name} must be on the CPU, got {given.device}. Keep the lengths on the CPU, or read "
            "them once with .cpu()."
        )
    is_whole = not (given.is_floating_point() or given.is_complex() or given.dtype == torch.bool)
    if given.dim() != 1 or (given.numel() and not is_whole):
        raise TypeError(
            f"{name} must be integers [documents], got {given.dtype} of shape "
            f"{tuple(given.shape)}. Pass numbers of tokens."
        )
    return given.to(torch.int64)
