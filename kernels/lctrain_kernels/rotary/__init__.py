"""Rotary position embeddings, optionally with RMSNorm of queries and keys before them."""

from lctrain_kernels.rotary.api import apply_rotary_emb, qk_norm_rotary, rotary_table, rotate_qk

__all__ = ["apply_rotary_emb", "qk_norm_rotary", "rotary_table", "rotate_qk"]
