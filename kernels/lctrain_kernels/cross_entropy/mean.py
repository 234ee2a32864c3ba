"""mean_over: the mean of a summed loss, for any number of tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def mean_over(loss_sum: Tensor, count: float | Tensor) -> Tensor:
    """Returns loss_sum / count; without a token, NaN with a gradient of 0.

    The NaN shows in the log that a batch had no label, as without the fused loss. The gradient of 0
    keeps the NaN out of the weights. The function does not synchronise with a device.

    Args:
        loss_sum: Summed loss, 0-dim.
        count: Number of tokens in the sum; a number, or a tensor of one element on any device.

    Returns:
        The mean, 0-dim, in the dtype of loss_sum.
    """
    if isinstance(count, Tensor):
        count = count.to(loss_sum.device).reshape(())
        mean = loss_sum / torch.where(count == 0, 1, count)
        return torch.where(count == 0, math.nan, mean)
    return loss_sum / count if count else loss_sum * 0 + math.nan
