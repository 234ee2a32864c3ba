"""Options of a rotation."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Any

from torch import Tensor

SCHEMA = "bool interleaved, bool full_table, float eps, float weight_offset, str backend"


@dataclass(frozen=True)
class RotaryOptions:
    """Options of a rotation. An operator takes them as separate arguments (`SCHEMA`).

    Attributes:
        interleaved: Whether columns 2 i and 2 i + 1 are a pair, as in GPT-J; otherwise columns i
            and i + R / 2.
        full_table: Whether cos and sin have a column per rotated column, as in transformers;
            otherwise one per pair, as in FlashAttention.
        eps: Epsilon of the norm before the rotation, if there is one.
        weight_offset: Added to the norm's weights.
        backend: Implementation: "triton" or "pytorch".
    """

    interleaved: bool
    full_table: bool
    eps: float
    weight_offset: float
    backend: str

    def rotary_columns(self, cos: Tensor) -> int:
        """R, the number of columns that are rotated."""
        return cos.shape[1] if self.full_table else 2 * cos.shape[1]

    def mathematics(self) -> dict[str, Any]:
        """All fields but the backend, as keyword arguments of the reference."""
        return {name: value for name, value in vars(self).items() if name != "backend"}

    def arguments(self) -> tuple[Any, ...]:
        """The fields in the order of `SCHEMA`."""
        return astuple(self)
