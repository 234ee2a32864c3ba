"""Constants that the portable kernels take as one launch argument each.

Triton compiles a variant per value. The fields are read by name in device code, `TILE.block_m`.
"""

from typing import NamedTuple

from lctrain_kernels.tile.arguments import padded_head_dim
from lctrain_kernels.tile.config import TileConfig


class TileShape(NamedTuple):
    """Sizes of a kernel's tile.

    Attributes:
        head_dim: D, columns of q and k.
        block_d: Columns of a tile, the power of two that holds D.
        group: Query heads per key/value head.
        block_m: Query rows of a tile: `pack` heads times positions.
        block_n: Keys of a tile.
        pack: Query heads of one key/value head that share a tile.
        value_dim: Dv, columns of v.
        block_dv: Columns of a tile of v.
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
    """Features of a kernel beyond plain attention.

    Attributes:
        has_left: A left bound of the window.
        has_right: A right bound of the window; a causal mask is one.
        has_softcap: Logits pass through c * tanh(x / c).
        has_alibi: ALiBi slopes are added to the logits.
        has_sink: Whether a learnable sink takes part in the softmax.
        has_dropout: Weights are dropped.
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
    """Returns the constants of one configuration.

    Args:
        config: Tile configuration.
        head_dim: D.
        group: Query heads per key/value head.
        value_dim: Dv; default D.
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
