"""States which calls the Hopper kernels of dual chunk attention support, and their tile sizes."""

from lctrain_kernels.gluon.config import BackwardTile, ForwardTile
from lctrain_kernels.gluon.support import DOUT_LIMIT, ONLY_VARLEN, Limit
from lctrain_kernels.gluon.support import FORWARD_LIMITS as VARLEN_LIMITS

FORWARD_LIMITS: tuple[Limit, ...] = (
    # Shared memory does not hold three tiles of queries beside keys and values.
    ("dual chunk attention of head dims above 128", lambda c: c.q.shape[2] > 128),
    *VARLEN_LIMITS,
)  # fmt: skip
BACKWARD_LIMITS: tuple[Limit, ...] = (
    *FORWARD_LIMITS,
    *ONLY_VARLEN,
    DOUT_LIMIT,
)
# A tile of dual chunk attention holds its queries twice; the third stage is for the next tile.
_FORWARD = {64: ForwardTile(128, 3, 3), 128: ForwardTile(128, 2, 3)}
_BACKWARD = {64: BackwardTile(64, 3), 128: BackwardTile(64, 2)}


def forward_tile(columns: int) -> ForwardTile:
    """Returns the forward's tile configuration for tiles of `columns` columns: 64, 128 or 256."""
    return _FORWARD[columns]


def backward_tile(columns: int) -> BackwardTile:
    """Returns the tile configuration of all backward launches, for tiles of 64 or 128 columns."""
    return _BACKWARD[columns]
