"""find_cache: decides whether a model generates by continuous batching over a paged cache."""

from __future__ import annotations

from typing import Any

from torch.distributed.tensor import DTensor

from lctrain.attention.forward import SPEC_ATTRIBUTE
from lctrain.attention.spec import ATTENTION_NAMES, AttentionSpec, DualChunkSpec
from lctrain.compiled import is_compiled
from lctrain.generation.forward import measure_cache
from lctrain.generation.pages import CacheShape
from lctrain.models.adapters import has_virtual_tokens
from lctrain.models.architectures import (
    attention_layers,
    counts_positions_itself,
    embeddings_read_mask,
)
from lctrain.models.batching import input_hook
from lctrain.models.code import parameters
from lctrain.models.frequencies import length_dependent


def find_cache(model: Any) -> CacheShape | str:
    """Returns the shape of a model's paged cache, or why the model needs padded batches.

    Args:
        model: A causal LM of transformers in eval mode, or a model of PEFT around one.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = _refusal(model, base) or measure_cache(model)
    specs = (getattr(layer, SPEC_ATTRIBUTE, None) for layer in attention_layers(base).values())
    scaled = [one for one in specs if isinstance(one, DualChunkSpec) and one.scale != "none"]
    if isinstance(found, str) or not scaled:
        return found
    return found._replace(window=scaled[0].window)


def _refusal(model: Any, base: Any) -> str | None:
    """Returns why a model needs padded batches, without a forward pass; None if it may not."""
    if has_virtual_tokens(model):
        return "its adapter has virtual tokens"
    name = getattr(base.config, "_attn_implementation", None) or ""
    if name not in ATTENTION_NAMES.values() or input_hook(base, name) is None:
        return "it is not patched"
    specs = [getattr(layer, SPEC_ATTRIBUTE, None) for layer in attention_layers(base).values()]
    if not all(isinstance(spec, AttentionSpec) and spec.backend != "hopper" for spec in specs):
        return "the backend 'hopper' has no decode kernels"
    if length_dependent(base) and name != ATTENTION_NAMES["dual_chunk"]:
        return "its RoPE frequencies depend on the length"
    counts = counts_positions_itself(base) or embeddings_read_mask(base)
    if counts or "position_ids" not in parameters(base):
        return "it counts positions itself"
    if any(isinstance(weight, DTensor) for weight in model.parameters()):
        return "its weights are sharded by another way than FSDP2"
    if any(is_compiled(module) for module in model.modules()):
        return "it is compiled"
    return None
