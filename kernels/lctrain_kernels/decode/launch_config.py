"""Tile sizes, split sizes and grids of the decode kernels.

A configuration depends on the device, the dtype and the head dim only, so a request gives the same
bits in every batch. `split="exact"` takes the tiles of the training kernel, varlen_fwd, instead.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lctrain_kernels.decode.prefixes import PREFIX_MULTIPLE
from lctrain_kernels.tile.arguments import padded_head_dim
from lctrain_kernels.tile.config import TileConfig, device_table, tile_config


@dataclass(frozen=True)
class DecodeConfig:
    """Configuration of the decode kernels.

    Attributes:
        tile: Rows, keys, warps and stages of the attention kernels.
        split_size: Keys of a split, a multiple of tile.block_n.
        programs: Programs of decode_split_kernel per multiprocessor, if it reads a plan.
        prefetch_pages: Whether page numbers are loaded one tile of keys ahead. Otherwise, their
            loads take stages of the pipeline of keys and values.
        shared_tiles: Tiles of decode_prefix_kernel for more rows than tile.block_m, by their rows.
        merge_rows: Rows of a program of decode_merge_kernel, a divisor of tile.block_m.
        merge_unroll: Splits whose results decode_merge_kernel loads together.
    """

    tile: TileConfig
    split_size: int
    programs: int = 4
    prefetch_pages: bool = False
    shared_tiles: tuple[TileConfig, ...] = ()
    merge_rows: int = 1
    merge_unroll: int = 16

    def tile_of_rows(self, rows: int) -> TileConfig:
        """Returns the tile of decode_prefix_kernel: the smallest that holds the rows of a group.

        Raises:
            ValueError: if a shared prefix may end inside a block of keys.
        """
        tiles = (self.tile, *self.shared_tiles)
        if any(PREFIX_MULTIPLE % tile.block_n for tile in tiles):
            raise ValueError(
                f"tiles of keys must divide {PREFIX_MULTIPLE} for shared prefixes, got "
                f"{[tile.block_n for tile in tiles]}. Plan without shared_prefixes."
            )
        return next((tile for tile in tiles if tile.block_m >= rows), tiles[-1])


# Architecture -> {largest padded head dim: configuration}. 16 rows hold the group of a query; the
# figures for D = 128 are in bench/NOTES.md.
_HOPPER = {
    64: DecodeConfig(
        TileConfig(16, 64, 4, 4),
        1024,
        prefetch_pages=True,
        shared_tiles=(TileConfig(64, 64, 4, 3), TileConfig(128, 64, 8, 3)),
    ),
    128: DecodeConfig(
        TileConfig(16, 64, 4, 3),
        1024,
        prefetch_pages=True,
        shared_tiles=(TileConfig(64, 64, 4, 3), TileConfig(128, 64, 8, 3)),
    ),
    256: DecodeConfig(
        TileConfig(16, 32, 4, 3),
        1024,
        prefetch_pages=True,
        shared_tiles=(TileConfig(64, 32, 4, 2), TileConfig(128, 32, 8, 2)),
    ),
}
_AMPERE = {
    64: DecodeConfig(TileConfig(32, 64, 4, 3), 512),
    128: DecodeConfig(TileConfig(32, 64, 4, 2), 512),
    256: DecodeConfig(TileConfig(32, 32, 4, 2), 512),
}
_CDNA = {
    64: DecodeConfig(TileConfig(32, 64, 4, 1), 512),
    128: DecodeConfig(TileConfig(32, 64, 4, 1), 512),
    256: DecodeConfig(TileConfig(32, 32, 4, 1), 512),
}
TABLES = {
    "sm_80": _AMPERE,
    "sm_90": _HOPPER,
    "sm_100": _HOPPER,
    "gfx942": _CDNA,
    "gfx950": _CDNA,
    "float32": {256: DecodeConfig(TileConfig(16, 32, 4, 1), 512)},
    # Two blocks of keys are a split, so that short requests have several splits.
    "interpreter": {
        256: DecodeConfig(TileConfig(16, 32, 4, 1), 64, 4, True, merge_rows=16, merge_unroll=2)
    },
}


def table_config(table: str, head_dim: int) -> DecodeConfig:
    """Returns the configuration of a head dim from one architecture's table.

    Args:
        table: Name of the architecture's table, a key of TABLES.
        head_dim: Head dim, 1 to 256.
    """
    sizes = TABLES[table]
    width = padded_head_dim(head_dim)
    return sizes[min(size for size in sizes if size >= width)]


def decode_config(q: Tensor) -> DecodeConfig:
    """Returns the configuration for the device, dtype and head dim of q [B, Sq, H, D]."""
    if _OVERRIDE:
        return _OVERRIDE[-1]
    return table_config(device_table(q), q.shape[-1])


def exact_config(q: Tensor, group: int) -> TileConfig:
    """Returns the tile of the training forward, backend="triton", for q [B, Sq, H, D].

    Args:
        q: Queries.
        group: Number of query heads per key/value head.
    """
    return tile_config("varlen_fwd", q.flatten(0, -3), group, False)


_OVERRIDE: list[DecodeConfig] = []


class override_decode_config:
    """Context manager that replaces the configuration of every call, for tuning and tests."""

    def __init__(self, config: DecodeConfig) -> None:
        self._config = config

    def __enter__(self) -> None:
        _OVERRIDE.append(self._config)

    def __exit__(self, *_: object) -> None:
        _OVERRIDE.pop()
