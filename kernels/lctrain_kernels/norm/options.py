"""Options of a norm."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class NormOptions:
    """Options of a norm over the last dimension.

    Attributes:
        eps: Added to the mean square (to the variance, for LayerNorm).
        weight_offset: Added to the weight in float32: 1 in Gemma.
        float32_product: Whether to multiply by the weight before rounding, as Gemma does. Otherwise
            the normalised values are rounded to the input's dtype first, as Llama does.
        centered: Subtract the mean: LayerNorm.
    """

    eps: float
    weight_offset: float = 0.0
    float32_product: bool = False
    centered: bool = False

    def out_dtype(self, x: torch.dtype, weight: torch.dtype) -> torch.dtype:
        """dtype of the result: Llama's product promotes, the others return the input's."""
        if self.float32_product or self.centered:
            return x
        return torch.promote_types(x, weight)
