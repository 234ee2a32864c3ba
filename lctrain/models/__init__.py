"""Patching of transformers models: patch_model and its handle."""

from lctrain.models.patch import PatchHandle, patch_model

__all__ = ["PatchHandle", "patch_model"]
