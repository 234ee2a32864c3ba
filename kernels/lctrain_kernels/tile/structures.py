"""Named tuples of compile-time constants, TileShape and Flags, of the portable kernels.

A kernel takes each as one constexpr and reads the fields by name (`TILE.block_m`). Triton compiles
the kernel again for every combination of values.
"""

from typing import NamedTuple

from lctrain_kernels.tile.arguments import padded_head_dim
from lctrain_kernels.tile.config import TileConfig


class TileShape(NamedTuple):
    """Sizes of a kernel's tile.

    Attributes:
        head_dim: Head dim D of q and k.
        block_d: Columns of a tile of q or k: the smallest power of two >= D, at least 16.
        group: Number of query heads per key/value head.
        block_m: Number of query rows of a tile: `pack` heads times positions.
        block_n: Number of keys of a tile.
        pack: Number of query heads of one key/value head that share a tile.
        value_dim: Head dim Dv of v.
        block_dv: Columns of a tile of v: the smallest power of two >= Dv, at least 16.
    """

    head_dim: int
    block_d: int
    group: int
    block_m: int
    block_n: int
    pack: int = 1
    value_dim: int = 0
    block_dv: int = 0


class Flags(NamedTuple):
    """Constant flags of the features that a kernel computes beyond plain attention.

    Attributes:
        has_left: Whether the window has a left bound.
        has_right: Whether the window has a right bound; a causal mask is one.
        has_softcap: Whether logits x become c * tanh(x / c).
        has_alibi: Whether ALiBi slopes are added to the logits.
        has_sink: Whether a learnable sink takes part in the softmax.
        has_dropout: Whether attention weights are dropped.
    """

    has_left: bool = False
    has_right: bool = True
    has_softcap: bool = False
    has_alibi: bool = False
    has_sink: bool = False
    has_dropout: bool = False


def tile_shape(
    config: TileConfig, head_dim: int, group: int, value_dim: int | None = None
) -> TileShape:
    """Returns the TileShape of a tile configuration and its head dims.

    Args:
        config: Tile configuration.
        head_dim: Head dim D of queries and keys.
        group: Number of query heads per key/value head.
        value_dim: Head dim Dv of the values; head_dim by default.
    """
    value_dim = head_dim if value_dim is None else value_dim
    return TileShape(
        head_dim=head_dim,
        block_d=padded_head_dim(head_dim),
        group=group,
        block_m=config.block_m,
        block_n=config.block_n,
        pack=config.pack,
        value_dim=value_dim,
        block_dv=padded_head_dim(value_dim),
    )
