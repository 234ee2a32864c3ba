"""lctrain's attention functions for transformers, with their options, masks and registration."""

from lctrain.attention.import_hook import register_with_transformers
from lctrain.attention.spec import (
    ATTENTION_NAMES,
    AttentionSpec,
    DifferentialSpec,
    DualChunkSpec,
    FlashSpec,
    is_patched,
    make_spec,
)

__all__ = [
    "ATTENTION_NAMES",
    "AttentionSpec",
    "DifferentialSpec",
    "DualChunkSpec",
    "FlashSpec",
    "is_patched",
    "make_spec",
    "register_with_transformers",
]
