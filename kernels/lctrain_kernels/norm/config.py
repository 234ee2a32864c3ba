"""Launch configurations of the norm's kernels, by hidden size and not by the number of rows.

`bench/NOTES.md` holds the measurements that the numbers come from.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_COLUMNS = 32768
"""Largest hidden size whose rows fit the registers of one program."""


@dataclass(frozen=True)
class NormConfig:
    """Tile of a norm's kernel.

    Attributes:
        rows: Rows that a program holds at one time.
        num_warps: Warps per program.
        stages: Depth of the backward's load pipeline.
        programs: Number of programs per multiprocessor in the backward.
    """

    rows: int
    num_warps: int
    stages: int = 1
    programs: int = 1


# Largest padded hidden size -> configuration.
FORWARD = {
    256: NormConfig(16, 4),
    1024: NormConfig(4, 4),
    2048: NormConfig(1, 4),
    4096: NormConfig(1, 8),
    8192: NormConfig(1, 16),
    16384: NormConfig(1, 16),
    MAX_COLUMNS: NormConfig(1, 32),
}
BACKWARD = {
    256: NormConfig(16, 4, 2, 4),
    1024: NormConfig(4, 4, 2, 4),
    2048: NormConfig(4, 8, 3, 1),
    4096: NormConfig(2, 8, 3, 1),
    8192: NormConfig(1, 8, 3, 1),
    16384: NormConfig(1, 16, 3, 1),
    MAX_COLUMNS: NormConfig(1, 32, 1, 1),
}


def norm_config(table: dict[int, NormConfig], block: int) -> NormConfig:
    """The configuration of the smallest listed size that holds `block` columns."""
    return next(config for size, config in table.items() if block <= size)
