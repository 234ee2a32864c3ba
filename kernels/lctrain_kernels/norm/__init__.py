"""RMSNorm and LayerNorm, also with the residual addition before them."""

from lctrain_kernels.norm.api import fused_add_rms_norm, layer_norm, rms_norm

__all__ = ["fused_add_rms_norm", "layer_norm", "rms_norm"]
