"""Inputs of the operators of dual chunk attention, and the constants of its rotations."""

from typing import NamedTuple

from torch import Tensor


class Operands(NamedTuple):
    """Inputs of the operators of dual chunk attention.

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
        chunk_length: Number of tokens c of a chunk.
        succ_length: Number of queries at the start of a chunk that have SUCC keys.
        inter_position: Constant position of every query, for RoPE, when it attends to INTER keys.
    """

    inv_freq: Tensor
    chunk_length: int
    succ_length: int
    inter_position: int
