"""Tiles of the Hopper kernels. As for the portable ones, nothing here depends on lengths."""

from typing import NamedTuple


class ForwardTile(NamedTuple):
    """Of varlen_fwd_hopper_kernel.

    Attributes:
        block_n: Keys of a block.
        stages: Blocks of keys, and of values, in shared memory.
        q_stages: Tiles of queries in shared memory.
    """

    block_n: int
    stages: int
    q_stages: int


class BackwardTile(NamedTuple):
    """Of varlen_bwd_hopper_kernel.

    Attributes:
        block_m: Queries of a block.
        stages: Blocks of queries in shared memory.
    """

    block_m: int
    stages: int


CONSUMERS = 2  # warpgroups of 64 rows
CONSUMER_REGISTERS = 168  # at entry; warp specialisation shares them out anew
BLOCK_N_BACKWARD = 128  # a block of the schedule

FORWARD = {64: ForwardTile(128, 3, 2), 128: ForwardTile(128, 2, 2), 256: ForwardTile(64, 2, 1)}
BACKWARD = {64: BackwardTile(128, 2), 128: BackwardTile(64, 2)}


def pack_heads(group: int) -> int:
    """Query heads of one key/value head that share a tile of 128 rows.

    More heads are fewer positions, and a smaller masked part of the diagonal.
    """
    return next(heads for heads in (4, 2, 1) if group % heads == 0)
