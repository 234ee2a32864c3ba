"""lctrain: long-context training for PyTorch Lightning.

    import lctrain

    handle = lctrain.patch_model(model, attention="flash")

A name's module is imported when the name is first used. So `import lctrain` imports neither
Lightning nor Triton.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lctrain.attention.import_hook import register_with_transformers

if TYPE_CHECKING:
    from lctrain import callbacks, data, kernels
    from lctrain.attention import AttentionSpec
    from lctrain.batch import PackedBatch
    from lctrain.data import PackedDataModule
    from lctrain.generation import generate
    from lctrain.generation.paged_cache import PagedCache
    from lctrain.models import PatchHandle, patch_model, patch_models
    from lctrain.module import LongContextModule

__all__ = [
    "AttentionSpec",
    "LongContextModule",
    "PackedBatch",
    "PackedDataModule",
    "PagedCache",
    "PatchHandle",
    "callbacks",
    "data",
    "generate",
    "kernels",
    "patch_model",
    "patch_models",
]

_HOMES = {
    "AttentionSpec": "lctrain.attention",
    "LongContextModule": "lctrain.module",
    "PackedBatch": "lctrain.batch",
    "PackedDataModule": "lctrain.data",
    "PagedCache": "lctrain.generation.paged_cache",
    "PatchHandle": "lctrain.models",
    "generate": "lctrain.generation",
    "patch_model": "lctrain.models",
    "patch_models": "lctrain.models",
}


# Registers attn_implementation="lctrain_flash" and lctrain's other attentions with transformers, at
# once or when transformers is imported.
register_with_transformers("lctrain.models.registration")


def __getattr__(name: str) -> Any:
    if name in ("callbacks", "data", "kernels"):
        return import_module(f"lctrain.{name}")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'lctrain' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
