"""Tensors and sizes that only dual chunk attention takes."""

from typing import NamedTuple

from torch import Tensor


class Operands(NamedTuple):
    """Arguments of the operators that only dual chunk attention has.

    Attributes:
        q: [T, H, D].
        k: [Tk, Hk, D].
        v: [Tk, Hk, D].
        inv_freq: [D/2] float32.
        logit_scale: [N] float32, or None.
        chunk_size: S.
        local_size: L.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    inv_freq: Tensor
    logit_scale: Tensor | None
    chunk_size: int
    local_size: int


class Rotation(NamedTuple):
    """Constants by which the kernels rotate queries and keys; see ranges.py.

    Attributes:
        inv_freq: [D/2] float32, radians per position.
        chunk_length: Tokens of a chunk, c.
        succ_length: Queries of a chunk that have SUCC keys.
        inter_position: Position of a query for its INTER keys.
    """

    inv_freq: Tensor
    chunk_length: int
    succ_length: int
    inter_position: int
