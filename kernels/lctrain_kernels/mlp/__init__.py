"""Gated and biased activations of feed-forward layers."""

from lctrain_kernels.mlp.api import bias_gelu, gated_linear, geglu, swiglu

__all__ = ["bias_gelu", "gated_linear", "geglu", "swiglu"]
