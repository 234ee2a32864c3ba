"""RMSNorm and LayerNorm, optionally fused with the residual addition before the norm."""

from lctrain_kernels.norm.api import (
    fused_add_layer_norm,
    fused_add_rms_norm,
    layer_norm,
    rms_norm,
    rms_norm_residual,
)

__all__ = [
    "fused_add_layer_norm",
    "fused_add_rms_norm",
    "layer_norm",
    "rms_norm",
    "rms_norm_residual",
]
