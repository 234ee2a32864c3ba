"""NormOptions: epsilon and kind (RMSNorm, Gemma's RMSNorm, LayerNorm) of a norm."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class NormOptions:
    """Epsilon and kind of a norm over the last dimension.

    Attributes:
        eps: Epsilon that is added to the mean square (RMSNorm) or to the variance (LayerNorm).
        weight_offset: Number that is added to the weight in float32; 1 for Gemma.
        float32_product: Whether to multiply by the weight in float32, as Gemma does. Otherwise the
            normalised values are rounded to the input's dtype before the product, as in Llama.
        centered: Whether to subtract the mean. True for LayerNorm, False for RMSNorm.
    """

    eps: float
    weight_offset: float = 0.0
    float32_product: bool = False
    centered: bool = False

    def out_dtype(self, x: torch.dtype, weight: torch.dtype) -> torch.dtype:
        """Returns the dtype of the normalised rows, from the dtypes of input and weight.

        It is the promoted dtype for Llama's RMSNorm, and the input's for Gemma and LayerNorm.
        """
        if self.float32_product or self.centered:
            return x
        return torch.promote_types(x, weight)
