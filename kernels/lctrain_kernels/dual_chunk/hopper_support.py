"""What the Hopper kernels of dual chunk attention do not support, and their tiles."""

from lctrain_kernels.gluon.config import BackwardTile, ForwardTile
from lctrain_kernels.gluon.support import DOUT_LIMIT, ONLY_VARLEN, Limit
from lctrain_kernels.gluon.support import FORWARD_LIMITS as VARLEN_LIMITS

FORWARD_LIMITS: tuple[Limit, ...] = (
    # Two tiles of queries and one of the next do not fit beside keys and values.
    ("dual chunk attention of head dims above 128", lambda c: c.q.shape[2] > 128),
    *VARLEN_LIMITS,
)  # fmt: skip
BACKWARD_LIMITS: tuple[Limit, ...] = (
    *FORWARD_LIMITS,
    *ONLY_VARLEN,
    DOUT_LIMIT,
)
# A tile of dual chunk attention holds its queries twice; the third place is for the next tile.
_FORWARD = {64: ForwardTile(128, 3, 3), 128: ForwardTile(128, 2, 3)}
_BACKWARD = {64: BackwardTile(64, 3), 128: BackwardTile(64, 2)}


def forward_tile(columns: int) -> ForwardTile:
    """Returns the tile of a forward of dual chunk attention."""
    return _FORWARD[columns]


def backward_tile(columns: int) -> BackwardTile:
    """Returns the tile of every launch of a backward of dual chunk attention."""
    return _BACKWARD[columns]
