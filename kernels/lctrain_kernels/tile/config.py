"""Tile sizes and launch options of the portable attention kernels.

One table per architecture maps an operation and a head dim to its configuration. A configuration
depends on nothing that changes from batch to batch (no lengths, no token counts), so a document
gives the same bits in every pack. The sizes come from the measurements in bench/NOTES.md.
"""

import functools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lctrain_kernels.tile.arguments import padded_head_dim


@dataclass(frozen=True)
class TileConfig:
    """Tile sizes and launch options of a portable attention kernel.

    A tile of the forward and of dq is block_m query rows, and the kernel loops over blocks of
    block_n keys. A tile of dk and dv is block_n keys, and the kernel loops over blocks of block_m
    queries.

    Attributes:
        block_m: Number of query rows. A row is a pair of query head and position.
        block_n: Number of keys.
        num_warps: Warps per program.
        num_stages: Triton's num_stages, the depth of the software pipeline of loads.
        pack: Number of query heads of one key/value head that share a tile, so that a tile has
            block_m / pack positions; 1 in kernels of dk and dv. With two heads, the masked part of
            the diagonal is half as large, while each loaded key is used as often.
        spill_free: Whether the plain causal kernel must compile without register spills; tested.
        max_registers: Limit of registers per thread, Triton's maxnreg, so that more programs fit on
            a multiprocessor; None for no limit.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    pack: int = 1
    max_registers: int | None = None
    spill_free: bool = False

    @property
    def options(self) -> dict[str, int]:
        """Triton's compile options: num_warps, num_stages, maxnreg, and fused multiply-adds."""
        options = {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,  # Triton 3.10 flips the default
        }
        if self.max_registers is not None:
            options["maxnreg"] = self.max_registers
        return options

    @property
    def positions(self) -> int:
        """Number of query positions of a tile, block_m / pack."""
        return self.block_m // self.pack


# Operation -> {largest padded head dim: configuration}. Variants of an operation have suffixes:
# "_dropout"  sizes that differ with dropout;
# "_shared"   sizes that differ if both branches of differential attention read one k;
# "_partial"  the launch of dual chunk attention to whose result a later launch adds.
# Differential attention ("diff_...") is listed by the sum of both padded head dims: 192 is keys of
# 64 with values of 128, 256 is keys and values of 128.
_HOPPER = {
    "varlen_fwd": {
        64: TileConfig(64, 64, 4, 3, pack=2, spill_free=True),
        128: TileConfig(128, 64, 8, 3, pack=2, spill_free=True),
        256: TileConfig(128, 64, 8, 2, pack=4),
    },
    "varlen_dq": {
        64: TileConfig(64, 64, 4, 3, pack=2, spill_free=True),
        128: TileConfig(64, 64, 4, 2, pack=2, spill_free=True),
        256: TileConfig(128, 32, 8, 2, pack=2, spill_free=True),
    },
    "varlen_dq_dropout": {
        128: TileConfig(128, 64, 8, 2, pack=4),
    },
    "varlen_dkv": {
        64: TileConfig(64, 64, 4, 3),
        128: TileConfig(64, 128, 8, 2),
        256: TileConfig(32, 64, 8, 2),
    },
    "dual_chunk_fwd": {
        64: TileConfig(128, 64, 4, 3, pack=2),
        128: TileConfig(128, 64, 8, 3, pack=4),
        256: TileConfig(64, 64, 8, 2, pack=2),
    },
    "dual_chunk_dq": {
        64: TileConfig(64, 64, 4, 3, pack=2),
        128: TileConfig(64, 64, 4, 2, pack=2),
        256: TileConfig(64, 32, 8, 2, pack=2),
    },
    "dual_chunk_dkv": {
        64: TileConfig(64, 64, 4, 3),
        128: TileConfig(64, 128, 8, 2),
        256: TileConfig(32, 64, 8, 1),
    },
    "dual_chunk_dkv_dropout": {
        128: TileConfig(32, 64, 4, 2),
    },
    "dual_chunk_dkv_partial": {
        128: TileConfig(32, 64, 4, 2),
    },
    "diff_fwd": {
        128: TileConfig(64, 64, 4, 3, pack=2, spill_free=True),
        192: TileConfig(128, 64, 8, 3, pack=2),
        256: TileConfig(128, 64, 8, 3, pack=2),
        384: TileConfig(64, 32, 8, 2, pack=2),
    },
    "diff_dq": {
        128: TileConfig(64, 64, 4, 2, pack=2, spill_free=True),
        192: TileConfig(64, 32, 4, 3, pack=2),
        256: TileConfig(128, 32, 8, 3, pack=2),
        384: TileConfig(64, 32, 8, 2, pack=2),
    },
    "diff_dq_dropout": {
        192: TileConfig(128, 64, 8, 2, pack=2),
    },
    "diff_dkv": {
        128: TileConfig(32, 64, 4, 2, spill_free=True),
        192: TileConfig(32, 64, 4, 3),
        256: TileConfig(32, 64, 8, 2),
        384: TileConfig(32, 64, 8, 2),
    },
    "diff_dkv_shared": {
        256: TileConfig(32, 128, 8, 3),
    },
}
# Half as many keys: accumulators of more than 512 columns of tensor memory compile to a trap.
_BLACKWELL = {
    **_HOPPER,
    "diff_dkv": {**_HOPPER["diff_dkv"], 256: TileConfig(32, 64, 4, 2)},
    "diff_dkv_shared": {256: TileConfig(32, 64, 4, 2)},
}
_AMPERE = {
    "varlen_fwd": {
        64: TileConfig(128, 64, 4, 3, pack=2),
        128: TileConfig(128, 32, 4, 3, pack=2),
        256: TileConfig(64, 32, 4, 2, pack=1),
    },
    "varlen_dq": {
        64: TileConfig(64, 64, 4, 2, pack=1),
        128: TileConfig(64, 64, 8, 2, pack=1),
        256: TileConfig(64, 32, 8, 1, pack=1),
    },
    "varlen_dkv": {
        64: TileConfig(64, 64, 4, 2),
        128: TileConfig(32, 64, 4, 2),
        256: TileConfig(32, 32, 4, 1),
    },
    "dual_chunk_fwd": {
        64: TileConfig(128, 64, 4, 3, pack=2),
        128: TileConfig(128, 32, 4, 3, pack=2),
        256: TileConfig(64, 32, 4, 2, pack=1),
    },
    "dual_chunk_dq": {
        64: TileConfig(64, 64, 4, 2, pack=1),
        128: TileConfig(64, 64, 8, 2, pack=1),
        256: TileConfig(64, 32, 8, 1, pack=1),
    },
    "dual_chunk_dkv": {
        64: TileConfig(64, 64, 4, 2),
        128: TileConfig(32, 64, 4, 2),
        256: TileConfig(32, 32, 4, 1),
    },
    "diff_fwd": {
        128: TileConfig(64, 64, 4, 2),
        256: TileConfig(64, 32, 4, 2),
        384: TileConfig(32, 32, 4, 2),
    },
    "diff_dq": {
        128: TileConfig(64, 32, 4, 2),
        256: TileConfig(64, 32, 8, 1),
        384: TileConfig(32, 32, 4, 1),
    },
    "diff_dkv": {
        128: TileConfig(32, 64, 4, 1),
        256: TileConfig(32, 32, 4, 1),
        384: TileConfig(16, 32, 4, 1),
    },
}
_CDNA = {
    "varlen_fwd": {
        64: TileConfig(128, 64, 4, 1, pack=1),
        128: TileConfig(128, 64, 4, 1, pack=1),
        256: TileConfig(64, 32, 4, 1, pack=1),
    },
    "varlen_dq": {
        64: TileConfig(64, 64, 4, 1, pack=1),
        128: TileConfig(64, 64, 4, 1, pack=1),
        256: TileConfig(64, 32, 4, 1, pack=1),
    },
    "varlen_dkv": {
        64: TileConfig(64, 64, 4, 1),
        128: TileConfig(64, 64, 4, 1),
        256: TileConfig(32, 32, 4, 1),
    },
    "dual_chunk_fwd": {
        64: TileConfig(128, 64, 4, 1, pack=1),
        128: TileConfig(128, 64, 4, 1, pack=1),
        256: TileConfig(64, 32, 4, 1, pack=1),
    },
    "dual_chunk_dq": {
        64: TileConfig(64, 64, 4, 1, pack=1),
        128: TileConfig(64, 64, 4, 1, pack=1),
        256: TileConfig(64, 32, 4, 1, pack=1),
    },
    "dual_chunk_dkv": {
        64: TileConfig(64, 64, 4, 1),
        128: TileConfig(64, 64, 4, 1),
        256: TileConfig(32, 32, 4, 1),
    },
    "diff_fwd": {
        256: TileConfig(64, 32, 4, 1),
        384: TileConfig(32, 32, 4, 1),
    },
    "diff_dq": {
        256: TileConfig(64, 32, 4, 1),
        384: TileConfig(32, 32, 4, 1),
    },
    "diff_dkv": {
        256: TileConfig(32, 32, 4, 1),
        384: TileConfig(16, 32, 4, 1),
    },
}
# Products of float32 run on the scalar units, in registers: small tiles.
_FLOAT32 = {
    "varlen_fwd": {64: TileConfig(32, 32, 4, 1), 256: TileConfig(16, 32, 4, 1)},
    "varlen_dq": {64: TileConfig(32, 32, 4, 1), 256: TileConfig(16, 32, 4, 1)},
    "varlen_dkv": {64: TileConfig(32, 32, 4, 1), 256: TileConfig(16, 32, 4, 1)},
    "dual_chunk_fwd": {64: TileConfig(32, 32, 4, 1), 256: TileConfig(16, 32, 4, 1)},
    "dual_chunk_dq": {64: TileConfig(32, 32, 4, 1), 256: TileConfig(16, 32, 4, 1)},
    "dual_chunk_dkv": {64: TileConfig(32, 32, 4, 1), 256: TileConfig(16, 32, 4, 1)},
    "diff_fwd": {192: TileConfig(32, 32, 4, 1), 384: TileConfig(16, 32, 4, 1)},
    "diff_dq": {192: TileConfig(32, 32, 4, 1), 384: TileConfig(16, 32, 4, 1)},
    "diff_dkv": {192: TileConfig(16, 32, 4, 1), 384: TileConfig(16, 16, 4, 1)},
}
# Small tiles for Triton's interpreter, so that short test documents span several tiles.
_INTERPRETER = {
    "varlen_fwd": {256: TileConfig(32, 32, 4, 1, pack=2)},
    "varlen_dq": {256: TileConfig(32, 32, 4, 1, pack=2)},
    "varlen_dkv": {256: TileConfig(16, 32, 4, 1)},
    "dual_chunk_fwd": {256: TileConfig(32, 32, 4, 1, pack=2)},
    "dual_chunk_dq": {256: TileConfig(32, 32, 4, 1, pack=2)},
    "dual_chunk_dkv": {256: TileConfig(16, 32, 4, 1)},
    "diff_fwd": {384: TileConfig(32, 32, 4, 1, pack=2)},
    "diff_dq": {384: TileConfig(32, 32, 4, 1, pack=2)},
    "diff_dkv": {384: TileConfig(16, 32, 4, 1)},
}
TABLES = {
    "sm_80": _AMPERE,
    "sm_90": _HOPPER,
    "sm_100": _BLACKWELL,
    "gfx942": _CDNA,
    "gfx950": _CDNA,
    "float32": _FLOAT32,
    "interpreter": _INTERPRETER,
}
OPERATIONS = ("varlen_fwd", "varlen_dq", "varlen_dkv")
DUAL_CHUNK_OPERATIONS = ("dual_chunk_fwd", "dual_chunk_dq", "dual_chunk_dkv")
DIFFERENTIAL_OPERATIONS = ("diff_fwd", "diff_dq", "diff_dkv")


def table_config(
    table: str,
    operation: str,
    head_dim: int,
    group: int,
    has_dropout: bool = False,
    value_dim: int | None = None,
    shared_k: bool = False,
    is_partial: bool = False,
) -> TileConfig:
    """Returns the tile configuration of an operation from one architecture's table.

    Args:
        table: Name of the architecture's table, a key of TABLES.
        operation: A key of the table, such as "varlen_fwd", "dual_chunk_dq" or "diff_dkv".
        head_dim: Head dim of queries and keys, 1 to 256.
        group: Number of query heads per key/value head, the most heads that can share a tile.
        has_dropout: Whether the kernel draws dropout masks.
        value_dim: Head dim of the values; given for differential attention only.
        shared_k: Whether both branches of differential attention read one k.
        is_partial: Whether a later launch adds to the result; dual chunk attention only.
    """
    width = padded_head_dim(head_dim)
    if value_dim is not None:
        width += padded_head_dim(value_dim)
    sizes = TABLES[table][operation]
    suffixes = {"shared": shared_k, "dropout": has_dropout, "partial": is_partial}
    for suffix, applies in suffixes.items():
        if applies:
            sizes = {**sizes, **TABLES[table].get(f"{operation}_{suffix}", {})}
    config = sizes[min(size for size in sizes if size >= min(width, max(sizes)))]
    return replace(config, pack=math.gcd(config.pack, group))


def tile_config(
    operation: str,
    q: Tensor,
    group: int,
    has_dropout: bool,
    value_dim: int | None = None,
    shared_k: bool = False,
    is_partial: bool = False,
) -> TileConfig:
    """Returns the tile configuration of an operation for the device, dtype and head dim of q.

    An override of override_configs comes before the tables. The other arguments are those of
    table_config; q is [T, H, D].
    """
    table = device_table(q)
    override = _OVERRIDES.get(f"{operation}_partial" if is_partial else operation)
    if override is not None:
        return replace(override, pack=math.gcd(override.pack, group))
    return table_config(
        table, operation, q.shape[2], group, has_dropout, value_dim, shared_k, is_partial
    )


def device_table(q: Tensor) -> str:
    """Returns the name of the table, a key of TABLES, for the device and dtype of q."""
    if q.device.type != "cuda":
        return "interpreter"
    return "float32" if q.dtype == torch.float32 else _device_table(q.device.index)


_OVERRIDES: dict[str, TileConfig] = {}


class override_configs:
    """Context manager that replaces tile configurations, for tuning and tests.

    Each keyword argument is an operation, such as varlen_fwd, with its TileConfig.
    """

    def __init__(self, **configs: TileConfig) -> None:
        self._configs = configs

    def __enter__(self) -> None:
        self._saved = dict(_OVERRIDES)
        _OVERRIDES.update(self._configs)

    def __exit__(self, *_: object) -> None:
        _OVERRIDES.clear()
        _OVERRIDES.update(self._saved)


@functools.cache
def _device_table(index: int | None) -> str:
    properties = torch.cuda.get_device_properties(index or 0)
    if torch.version.hip:
        return "gfx950" if "gfx95" in properties.gcnArchName else "gfx942"
    if properties.major >= 10:
        return "sm_100"
    return "sm_90" if properties.major == 9 else "sm_80"
