"""Patches transformers models with lctrain's attention: patch_model, patch_models, handles."""

from lctrain.models.patch import PatchHandle, patch_model
from lctrain.models.within import ModelPatches, find_models, patch_models

__all__ = ["ModelPatches", "PatchHandle", "find_models", "patch_model", "patch_models"]
