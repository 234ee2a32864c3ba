"""TokenWindow: averages the loss of an optimizer step over the tokens of all micro-batches."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lctrain.distributed import Topology
from lctrain.distributed.sharding import local_part
from lctrain_kernels.cross_entropy.mean import mean_over


class TokenWindow:
    """Sums the losses and counts the tokens of the micro-batches of one optimizer step.

    These micro-batches form a window. Every micro-batch back-propagates its summed loss. At the end
    of the window, `close` divides the gradients by the number of valid tokens in the window on all
    ranks. It needs one all-reduce and no synchronisation with the device.

    Attributes:
        last_loss: Loss per token of the last closed window, 0-dim float64 tensor; None before the
            first, and NaN for a window without a valid token.
    """

    def __init__(self) -> None:
        self.last_loss: Tensor | None = None
        self._sum: Tensor | None = None
        self._tokens: int | Tensor = 0

    @property
    def open(self) -> bool:
        """Whether a micro-batch has been added since the last `close`."""
        return self._sum is not None

    def add(self, loss_sum: Tensor, tokens: int | Tensor) -> None:
        """Adds one micro-batch.

        Args:
            loss_sum: Summed loss of the micro-batch, 0-dim.
            tokens: Number of valid tokens in the sum, an int or a 0-dim tensor.
        """
        if self._sum is None:
            self._sum = torch.zeros((), dtype=torch.float64, device=loss_sum.device)
            self._tokens = 0
        self._sum += loss_sum.detach()
        self._tokens = self._tokens + tokens

    def close(self, parameters: Iterable[Tensor], averaged: int, ranks: Topology) -> None:
        """Scales the gradients by `averaged` / (valid tokens of the window on all ranks).

        Args:
            parameters: Parameters whose gradients are scaled.
            averaged: Number by which the gradients have already been divided. Lightning divides by
                the micro-batches of a window, and DistributedDataParallel by the ranks.
            ranks: Ranks over which loss sums and tokens are added up.
        """
        assert self._sum is not None
        if isinstance(self._tokens, Tensor):
            tokens = self._tokens.to(self._sum)
        else:
            tokens = self._sum.new_full((), float(self._tokens))
        totals = torch.stack([self._sum, tokens])  # [2] float64: loss sum, tokens
        ranks.sum(totals)
        loss_sum, tokens = totals[0], totals[1].clamp(min=1.0)
        self.last_loss = mean_over(loss_sum, totals[1])
        gradients = [local_part(p.grad) for p in parameters if p.grad is not None]
        for group in _by_device_and_dtype(gradients):
            factor_dtype = torch.promote_types(group[0].dtype, torch.float32)
            torch._foreach_mul_(group, (averaged / tokens).to(factor_dtype))
        self.discard()

    def discard(self) -> None:
        """Empties the window without scaling gradients."""
        self._sum, self._tokens = None, 0


def _by_device_and_dtype(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Groups tensors by device and dtype, so that one fused operation can serve each group."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return list(groups.values())
