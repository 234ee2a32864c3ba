"""RotaryOptions: layout, norm and backend of a rotary embedding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

SCHEMA = "bool interleaved, bool full_table, float eps, float weight_offset, str backend"


@dataclass(frozen=True)
class RotaryOptions:
    """Layout, norm and backend of a rotary embedding.

    The operators take the fields as separate arguments, in the order of `SCHEMA`.

    Attributes:
        interleaved: Whether columns 2 i and 2 i + 1 are a pair, as in GPT-J. Otherwise columns i
            and i + R / 2 of the R rotated columns are a pair.
        full_table: Whether cos and sin have a column per rotated column, as in transformers.
            Otherwise they have a column per pair, as in FlashAttention.
        eps: Epsilon of the RMSNorm before the rotation, if there is one.
        weight_offset: Number that is added to the norm's weights; 1 for Gemma.
        backend: Implementation: "triton" or "pytorch".
    """

    interleaved: bool
    full_table: bool
    eps: float
    weight_offset: float
    backend: str

    def rotary_columns(self, cos: Tensor) -> int:
        """Returns R, the number of columns of a head that are rotated."""
        return cos.shape[1] if self.full_table else 2 * cos.shape[1]

    def mathematics(self) -> dict[str, Any]:
        """Returns all fields except `backend`, as keyword arguments of reference.py's functions."""
        return {name: value for name, value in vars(self).items() if name != "backend"}

    def arguments(self) -> tuple[Any, ...]:
        """Returns the fields in the order of `SCHEMA`."""
        return tuple(getattr(self, name) for name in _FIELDS)


_FIELDS = tuple(RotaryOptions.__dataclass_fields__)
