"""Tensors and sizes that only dual chunk attention takes."""

from typing import NamedTuple

from torch import Tensor


class Operands(NamedTuple):
    """Arguments of the operators that only dual chunk attention has.

    Attributes:
        q: Packed queries [T, H, D].
        k: Packed keys [Tk, Hk, D].
        v: Packed values [Tk, Hk, D].
        inv_freq: RoPE frequencies [D/2] float32, in radians per position.
        logit_scale: Factor of the logits of each document, [N] float32, or None.
        chunk_size: Largest relative position S.
        local_size: Distance L up to which positions stay exact across a chunk boundary.
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
        inv_freq: RoPE frequencies [D/2] float32, in radians per position.
        chunk_length: Tokens of a chunk, c.
        succ_length: Queries of a chunk that have SUCC keys.
        inter_position: Position of a query for its INTER keys.
    """

    inv_freq: Tensor
    chunk_length: int
    succ_length: int
    inter_position: int
