"""The window of a call, as the operators take it."""

from collections.abc import Sequence

import torch
from torch import Tensor


def resolve_window(
    window_size: Sequence[int] | Tensor, causal: bool
) -> tuple[Tensor | None, int, int]:
    """Returns (device tensor or None, left, right); causal is right = 0."""
    if isinstance(window_size, Tensor):
        if causal:
            window_size = torch.cat([window_size[:1], window_size.new_zeros(1)])
        return window_size, -1, -1
    left, right = window_size
    return None, left if left >= 0 else -1, 0 if causal else (right if right >= 0 else -1)
