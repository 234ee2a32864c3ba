"""Reduces the softmax statistics over the ranks that share a vocabulary."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

from lctrain_kernels.cross_entropy.rows import EXP_SUM, MAXIMUM


def reduce_statistics(statistics: Tensor, group_name: str) -> None:
    """Reduces the softmax statistics of C tokens over the ranks of a vocabulary, in place.

    Args:
        statistics: Statistics [4, C] of this rank's logits: maximum, sum of exponentials, logit of
            the label, sum of the logits. They become those of all ranks' logits.
        group_name: Name of the process group of the ranks.
    """
    from torch.distributed.distributed_c10d import _resolve_process_group

    resolve: Any = _resolve_process_group
    group = resolve(group_name)
    local = statistics[MAXIMUM]
    empty = statistics[EXP_SUM] == 0.0  # no finite logit: its maximum must not count
    top = local.masked_fill(empty, -float("inf"))
    dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
    top = top.masked_fill(top == -float("inf"), 0.0)
    sums = statistics[EXP_SUM:].clone()  # [3, C]
    sums[0] *= (local - top).masked_fill_(empty, -float("inf")).exp_()
    dist.all_reduce(sums, group=group)
    statistics[MAXIMUM] = top
    statistics[EXP_SUM:] = sums
