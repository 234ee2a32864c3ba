"""Launch configurations of row_pass_kernel, which computes softmax statistics and gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RowConfig:
    """Launch configuration of row_pass_kernel, whose programs process one row of logits at a time.

    Attributes:
        block: Number of logits of a row that a program loads at a time.
        num_warps: Warps per program.
        stages: Triton's num_stages, the depth of the load pipeline.
        programs: Number of programs per multiprocessor. Each program reads its row twice. With few
            programs the row is still in the L2 cache at the second reading.
    """

    block: int
    num_warps: int
    stages: int
    programs: int


HALF = RowConfig(2048, 4, 4, 4)
SINGLE = RowConfig(2048, 8, 2, 2)


def row_config(dtype: torch.dtype) -> RowConfig:
    """Returns the launch configuration of row_pass_kernel for logits of a dtype."""
    return SINGLE if dtype == torch.float32 else HALF
