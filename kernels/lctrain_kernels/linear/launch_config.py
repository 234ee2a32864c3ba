"""Tiles of batch_invariant_linear_kernel.

The tile depends on the device, the dtype and the shape of the weight. On sm_90 alone, it also
depends on the number of rows: few rows take small tiles, so that more multiprocessors read the
weight. The bits are the same: all tiles have one BLOCK_K, and the same sequence of wgmma
instructions sums every element, 16 numbers at a time. Tiles differ in the rows and columns of an
instruction, which have no part in the sum of an element. `test_batch_invariant_gpu.py` compares the
bits. Where this is not tested, one tile serves all numbers of rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lctrain_kernels.multiprocessors import multiprocessors
from lctrain_kernels.tile.config import device_table


@dataclass(frozen=True)
class LinearTile:
    """Tile of batch_invariant_linear_kernel.

    Attributes:
        block_m: Rows of a tile.
        block_n: Columns of a tile, rows of the weight.
        block_k: Numbers of a row that are loaded at a time.
        num_warps: Warps per program.
        stages: Depth of the load pipeline.
        group: Tiles of rows that read one tile of the weight after one another.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    stages: int
    group: int = 8


@dataclass(frozen=True)
class LinearTiles:
    """Tiles of one architecture.

    Attributes:
        wide: Tile of weights with more than narrow.block_n rows.
        narrow: Tile of other weights, such as those of adapters.
        few: Tile of calls in which these tiles would leave multiprocessors idle; None for none.
    """

    wide: LinearTile
    narrow: LinearTile
    few: LinearTile | None = None


_PORTABLE = LinearTiles(LinearTile(128, 128, 32, 8, 2), LinearTile(128, 64, 32, 4, 2))
TABLES = {
    "sm_90": LinearTiles(
        LinearTile(128, 256, 64, 8, 3), LinearTile(128, 64, 64, 4, 4), LinearTile(64, 32, 64, 4, 8)
    ),
    **dict.fromkeys(("sm_80", "sm_100", "gfx942", "gfx950"), _PORTABLE),
    "float32": LinearTiles(LinearTile(64, 64, 32, 4, 2), LinearTile(64, 64, 32, 4, 2)),
    "interpreter": LinearTiles(LinearTile(32, 32, 32, 4, 1), LinearTile(32, 32, 32, 4, 1)),
}


def tiles_of(x: Tensor) -> LinearTiles:
    """Returns the tiles for the device and dtype of x."""
    if x.device.type == "cuda" and x.dtype == torch.float32:
        return TABLES["float32"]
    return TABLES[device_table(x)]


def linear_tile(x: Tensor, columns: int) -> LinearTile:
    """Returns the tile of a call.

    Args:
        x: Inputs [T, K].
        columns: Number of columns of the result.
    """
    if _OVERRIDE:
        return _OVERRIDE[-1]
    tiles = tiles_of(x)
    tile = tiles.narrow if columns <= tiles.narrow.block_n else tiles.wide
    programs = -(-x.shape[0] // tile.block_m) * -(-columns // tile.block_n)
    if tiles.few is not None and programs < multiprocessors(x.device):
        return tiles.few
    return tile


_OVERRIDE: list[LinearTile] = []


class override_linear_tile:
    """Context manager that replaces the tile of every call, for tuning and tests."""

    def __init__(self, tile: LinearTile) -> None:
        self._tile = tile

    def __enter__(self) -> None:
        _OVERRIDE.append(self._tile)

    def __exit__(self, *_: object) -> None:
        _OVERRIDE.pop()
