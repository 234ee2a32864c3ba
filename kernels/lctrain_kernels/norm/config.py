"""Launch configurations of the norm kernels, by hidden size.

A configuration does not depend on the number of rows. The sizes come from the measurements in
`bench/NOTES.md`.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_COLUMNS = 32768
"""Largest hidden size whose rows fit the registers of one program."""


@dataclass(frozen=True)
class NormConfig:
    """Launch configuration of a norm kernel.

    Attributes:
        rows: Number of rows that a program holds in registers at a time.
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
    """Returns the launch configuration for rows of `block` columns, a power of two.

    It is that of the smallest hidden size in `table` that is >= `block`.
    """
    for size, config in table.items():
        if block <= size:
            return config
    raise ValueError(f"columns must be at most {MAX_COLUMNS}, got {block}.")
