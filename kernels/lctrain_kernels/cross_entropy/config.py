"""Launch configurations of the pass over the logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RowConfig:
    """Tile of the pass over a row of logits.

    Attributes:
        block: Vocabulary entries that a program loads at a time.
        num_warps: Warps per program.
        stages: Depth of the load pipeline.
        programs: Programs per multiprocessor. So many rows are between their two readings at one
            time: with few, the second one is served by the L2 cache.
    """

    block: int
    num_warps: int
    stages: int
    programs: int


HALF = RowConfig(2048, 4, 4, 4)
SINGLE = RowConfig(2048, 8, 2, 2)


def row_config(dtype: torch.dtype) -> RowConfig:
    """The configuration for logits of this dtype."""
    return SINGLE if dtype == torch.float32 else HALF
