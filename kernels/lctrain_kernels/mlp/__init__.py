"""Fused activations of feed-forward layers: SwiGLU, GeGLU and GELU with a bias."""

from lctrain_kernels.mlp.api import bias_gelu, gated_linear, geglu, swiglu

__all__ = ["bias_gelu", "gated_linear", "geglu", "swiglu"]
