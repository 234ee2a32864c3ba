"""States which calls the Hopper kernels of dual chunk attention support, and their tile sizes."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

from lctrain_kernels.gluon.config import SLAB_ROWS, BackwardTile, ForwardTile, slab_rows
from lctrain_kernels.gluon.launch import padded_columns
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


class BackwardForm(NamedTuple):
    """Tile and form of the steps of the Hopper backward.

    Attributes:
        tile: Tile configuration. With reduce_from_registers, dq of a step is added in the next one.
        full_weights: Whether weights stay in float32 until dS is computed; they always do with
            reduce_from_registers.
    """

    tile: BackwardTile
    full_weights: bool = False


# A tile of dual chunk attention holds its queries twice; the third stage is for the next tile.
_FORWARD = {64: ForwardTile(128, 3, 3), 128: ForwardTile(128, 2, 3)}
_BACKWARD = {
    columns: BackwardForm(BackwardTile(64, 3, reduce_from_registers=True), full_weights=True)
    for columns in (64, 128)
}
# The same where the dQ warp adds partial dq. dk and dv have the same bits in both.
_BACKWARD_DQ_WARP = {
    64: BackwardForm(BackwardTile(64, 3), full_weights=True),
    128: BackwardForm(BackwardTile(64, 2), full_weights=True),
}


def forward_tile(columns: int) -> ForwardTile:
    """Returns the forward's tile configuration for tiles of `columns` columns: 64, 128 or 256."""
    return _FORWARD[columns]


def backward_form(head_dim: int, total_q: int, documents: int) -> BackwardForm:
    """Returns the form of all backward launches of a call.

    Adding dq from registers takes slabs of 16 queries, and they take head dims that are multiples
    of 16. With less than 16 queries per document on average they would take more than twice the
    memory of dq. The dQ warp then adds partial dq.

    Args:
        head_dim: Head dim D, at most 128.
        total_q: Number of packed queries.
        documents: Number of documents.
    """
    columns = padded_columns(head_dim)
    form = _override or _BACKWARD[columns]
    has_slabs = head_dim % SLAB_ROWS == 0 and slab_rows(total_q, documents) == SLAB_ROWS
    if form.tile.reduce_from_registers and not has_slabs:
        return _BACKWARD_DQ_WARP[columns]
    return form


@contextlib.contextmanager
def override_backward(form: BackwardForm | None) -> Iterator[None]:
    """Context manager that replaces the form of all backwards, for tuning and tests."""
    global _override
    saved, _override = _override, form
    try:
        yield
    finally:
        _override = saved


_override: BackwardForm | None = None
