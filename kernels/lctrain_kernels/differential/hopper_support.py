"""States which calls the Hopper kernels of differential attention support, and their tile sizes."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from lctrain_kernels.gluon.config import BackwardTile, ForwardTile, slab_rows
from lctrain_kernels.gluon.support import DOUT_LIMIT, MAX_ROWS, ONLY_VARLEN, unaligned


@dataclass(frozen=True)
class DifferentialCall:
    """Properties of a differential call that decide whether the Hopper kernels support it.

    Attributes:
        q1: Packed queries of branch 1, [T, H, D].
        q2: Packed queries of branch 2, [T, H, D].
        k1: Packed keys of branch 1, [Tk, Hk, D].
        k2: Packed keys of branch 2, [Tk, Hk, D]; None if both branches read k1.
        v: Packed values [Tk, Hk, Dv].
        dout: Gradient of out, [T, H, Dv]; None in the forward.
        deterministic: Whether dq1 and dq2 must have the same bits in every run.
        dropout: Whether attention weights are dropped.
    """

    q1: Tensor
    q2: Tensor
    k1: Tensor
    k2: Tensor | None
    v: Tensor
    dout: Tensor | None = None
    deterministic: bool = False
    dropout: bool = False

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Returns q1, q2, k1 and v, and k2 if it is not None."""
        inputs = (self.q1, self.q2, self.k1, self.v)
        return inputs if self.k2 is None else (*inputs, self.k2)


_Limit = tuple[str, Callable[[DifferentialCall], bool]]
FORWARD_LIMITS: tuple[_Limit, ...] = (
    ("dtypes other than float16 and bfloat16", lambda c: c.q1.element_size() != 2),
    ("values of head dims above 128", lambda c: c.v.shape[2] > 128),
    ("packs without keys", lambda c: c.k1.shape[0] == 0),
    ("more than 2^30 tokens", lambda c: max(c.q1.shape[0], c.k1.shape[0]) > MAX_ROWS),
    ("strides or addresses that are no multiples of 16 bytes",
     lambda c: any(unaligned(x) for x in c.inputs)),
)  # fmt: skip
BACKWARD_LIMITS: tuple[_Limit, ...] = (
    *FORWARD_LIMITS,
    # Three accumulators of 64 by 128 leave no registers for the weights.
    ("the backward of head dims above 64 with a k per branch",
     lambda c: c.q1.shape[2] > 64 and c.k2 is not None),
    *ONLY_VARLEN,
    DOUT_LIMIT,
)  # fmt: skip
# (columns of q and k, columns of v, whether both branches read one k) -> configuration.
_FORWARD = {
    (64, 64, False): ForwardTile(64, 4, 2),
    (64, 64, True): ForwardTile(64, 4, 2),
    (64, 128, False): ForwardTile(64, 3, 2),
    (64, 128, True): ForwardTile(64, 4, 2),
    (128, 128, False): ForwardTile(64, 2, 1),
    (128, 128, True): ForwardTile(64, 2, 2),
}
COLUMNS = tuple(_FORWARD)
_BACKWARD = {
    (64, 64, False): BackwardTile(64, 3),
    (64, 64, True): BackwardTile(64, 3),
    (64, 128, False): BackwardTile(64, 2),
    (64, 128, True): BackwardTile(64, 2),
    (128, 128, True): BackwardTile(64, 2, reduce_from_registers=True),
}


def forward_tile(columns: int, value_columns: int, shared_k: bool) -> ForwardTile:
    """Returns the forward's tile configuration.

    Args:
        columns: Columns of a tile of queries and keys: 64 or 128.
        value_columns: Columns of a tile of values: 64 or 128.
        shared_k: Whether both branches read one k.
    """
    return _FORWARD[columns, value_columns, shared_k]


def backward_tile(
    columns: int, value_columns: int, shared_k: bool, total_q: int = 1 << 15, documents: int = 1
) -> BackwardTile:
    """Returns the backward's tile configuration.

    With less than 16 queries per document on average, slabs of 16 queries would take more than
    twice the memory of dq, so the dQ warp adds partial dq.

    Args:
        columns: Columns of a tile of queries and keys: 64 or 128.
        value_columns: Columns of a tile of values: 64 or 128.
        shared_k: Whether both branches read one k.
        total_q: Number of packed queries.
        documents: Number of documents.
    """
    tile = _BACKWARD[columns, value_columns, shared_k]
    if _from_registers is not None:
        tile = tile._replace(reduce_from_registers=_from_registers)
    if slab_rows(total_q, documents) == 1:
        return tile._replace(reduce_from_registers=False)
    return tile


@contextlib.contextmanager
def override_backward(from_registers: bool | None) -> Iterator[None]:
    """Context manager that says how all backwards add dq, for tuning and tests."""
    global _from_registers
    saved, _from_registers = _from_registers, from_registers
    try:
        yield
    finally:
        _from_registers = saved


_from_registers: bool | None = None
