"""keep_top_p: leaves the most probable tokens that sum to a share, without a sort."""

from __future__ import annotations

import torch
from torch import Tensor

_ONE = 0x3F800000
"""Bits of 1.0 in float32. Bits of floats from 0 to 1 have the order of the floats."""


def keep_top_p(scores: Tensor, top_p: float) -> Tensor:
    """Returns scores with -inf at all but the fewest most probable tokens that sum to `top_p`.

    The lowest kept probability is found by bisection over the bits of a float32, so it is exact.
    All tokens of that probability are kept. Nothing is sorted or scanned, so the call works with
    deterministic algorithms and in a CUDA graph.

    Args:
        scores: [B, V] float32.
        top_p: Sum of the probabilities, above 0 and below 1.
    """
    share = scores.softmax(-1)
    low = torch.zeros(len(scores), 1, dtype=torch.int32, device=scores.device)
    high = torch.full_like(low, _ONE + 1)
    kept = torch.empty_like(share)
    for _ in range(_ONE.bit_length()):
        middle = (low + high) >> 1
        torch.mul(share, share >= middle.view(torch.float32), out=kept)
        enough = kept.sum(-1, keepdim=True) >= top_p
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return scores.masked_fill(share < low.view(torch.float32), float("-inf"))
