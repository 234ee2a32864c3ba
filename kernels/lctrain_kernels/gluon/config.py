"""Tile configurations of the Hopper kernels. They do not depend on lengths."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

from lctrain_kernels.gluon.structures import BackwardShape, ForwardShape

CONSUMERS = 2  # warpgroups of a forward, of 64 rows each
REGISTERS = 168  # of each thread at entry; warp specialisation shares them out anew
REGISTERS_OF_THREE = 128  # the same, where a forward has three warpgroups


class ForwardTile(NamedTuple):
    """Tile configuration of the forward kernels.

    Attributes:
        block_n: Keys of a block.
        stages: Blocks of keys, and of values, in shared memory.
        q_stages: Tiles of queries in shared memory.
        consumers: Warpgroups of 64 rows each; other than two in varlen_fwd_hopper_kernel alone.
        sync_before_products: The warps of a warpgroup synchronise before the products of a block,
            not after them. varlen_fwd_hopper_kernel alone reads it.
    """

    block_n: int
    stages: int
    q_stages: int
    consumers: int = CONSUMERS
    sync_before_products: bool = False


class BackwardTile(NamedTuple):
    """Tile configuration of the backward kernels.

    Attributes:
        block_m: Queries of a block, 64.
        stages: Blocks of queries in shared memory, from 2 to signals.MOST_STAGES.
        reduce_from_registers: Whether the warpgroups that compute dq add it to global memory
            themselves, instead of a warp that reads it from shared memory; varlen_bwd_hopper_kernel
            only.
    """

    block_m: int
    stages: int
    reduce_from_registers: bool = False


# By the columns of a tile: head dims up to them.
_FORWARD = {
    64: ForwardTile(128, 3, 2),
    128: ForwardTile(128, 2, 2, sync_before_products=True),
    256: ForwardTile(64, 2, 1),
}
_FORWARD_OF_ONE_HEAD = {64: ForwardTile(64, 4, 2, consumers=3)}
_BACKWARD = {64: BackwardTile(64, 4, reduce_from_registers=True), 128: BackwardTile(64, 2)}
BLOCK_N_BACKWARD = 128  # a block of the schedule


def forward_shape(
    tile: ForwardTile,
    columns: int,
    group: int,
    heads: int,
    pack: int,
    value_columns: int = 0,
    num_k: int = 1,
) -> ForwardShape:
    """Returns the constants of a forward kernel.

    Args:
        tile: Entry of a table of this module.
        columns: Columns of a tile of queries and keys.
        group: Number of query heads per key/value head.
        heads: Number of query heads.
        pack: Query heads that share a tile.
        value_columns: Columns of a tile of values, of differential attention.
        num_k: Tensors of keys.
    """
    return ForwardShape(
        group=group,
        heads=heads,
        pack=pack,
        consumers=tile.consumers,
        block_n=tile.block_n,
        block_d=columns,
        q_stages=tile.q_stages,
        stages=tile.stages,
        meet_early=tile.sync_before_products,
        block_dv=value_columns,
        num_k=num_k,
    )


def backward_shape(
    tile: BackwardTile,
    columns: int,
    group: int,
    heads_kv: int,
    head_dim: int,
    deterministic: bool = False,
    value_dim: int = 0,
    value_columns: int = 0,
    num_k: int = 1,
) -> BackwardShape:
    """Returns the constants of a backward kernel.

    Args:
        tile: Entry of a table of this module.
        columns: Columns of a tile of queries and keys.
        group: Number of query heads per key/value head.
        heads_kv: Number of key/value heads.
        head_dim: Head dim D of queries and keys.
        deterministic: Whether partial dq must be added in the order of the keys.
        value_dim: Head dim Dv of the values in differential attention.
        value_columns: Columns of a tile of values, of differential attention.
        num_k: Tensors of keys.
    """
    return BackwardShape(
        group=group,
        heads_kv=heads_kv,
        head_dim=head_dim,
        block_m=tile.block_m,
        block_n=BLOCK_N_BACKWARD,
        block_d=columns,
        stages=tile.stages,
        dq_from_registers=tile.reduce_from_registers,
        deterministic=deterministic,
        value_dim=value_dim,
        block_dv=value_columns,
        num_k=num_k,
    )


def pack_heads(group: int) -> int:
    """Query heads of one key/value head that share a tile of 128 rows.

    They read the same keys, so that the tile has fewer positions and ends closer to a document's
    end.
    """
    return next(heads for heads in (4, 2, 1) if group % heads == 0)


def forward_tile(columns: int, pack: int, has_dropout: bool) -> ForwardTile:
    """Returns the tile of a forward.

    Rows of several heads do not divide among three warpgroups, which have no registers for random
    bits either.
    """
    free = pack == 1 and not has_dropout
    table = _FORWARD | _FORWARD_OF_ONE_HEAD if free else _FORWARD
    tile = _forward_override or table[columns]
    return tile if free else tile._replace(consumers=CONSUMERS)


def entry_registers(consumers: int) -> int:
    """Returns the registers per thread at entry of a forward; see REGISTERS."""
    return REGISTERS if consumers == CONSUMERS else REGISTERS_OF_THREE


def backward_tile(columns: int, deterministic: bool) -> BackwardTile:
    """Returns the tile of a backward.

    Args:
        columns: Columns of a tile.
        deterministic: Whether dq must have the same bits in every run, for which a warp adds it,
            whatever is forced.
    """
    tile = _backward_override or _BACKWARD[columns]
    return tile._replace(reduce_from_registers=False) if deterministic else tile


@contextlib.contextmanager
def override_tiles(
    forward: ForwardTile | None = None, backward: BackwardTile | None = None
) -> Iterator[None]:
    """Forces tiles, for tuning and for tests."""
    global _forward_override, _backward_override
    saved = _forward_override, _backward_override
    _forward_override, _backward_override = forward, backward
    try:
        yield
    finally:
        _forward_override, _backward_override = saved


_forward_override: ForwardTile | None = None
_backward_override: BackwardTile | None = None
