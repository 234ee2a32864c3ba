"""Attention of lctrain inside transformers: its spec, its names, and their registration."""

from lctrain.attention.import_hook import register_with_transformers
from lctrain.attention.spec import ATTENTION_NAMES, AttentionSpec, is_patched

__all__ = ["ATTENTION_NAMES", "AttentionSpec", "is_patched", "register_with_transformers"]
