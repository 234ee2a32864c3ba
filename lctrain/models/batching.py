"""require_batching: checks that transformers' continuous batching can serve a patched model.

transformers runs continuous batching in a thread, and an error there ends in empty completions. So
the checks run when the manager is made, before any token.
"""

from typing import Any

from torch import nn

from lctrain.attention.forward import SPEC_ATTRIBUTE
from lctrain.models.architectures import (
    attention_layers,
    counts_positions_itself,
    embeddings_read_mask,
)
from lctrain.models.code import parameters
from lctrain.models.frequencies import length_dependent
from lctrain.models.inputs import InputHook
from lctrain.models.late_hook import LateHook, prepare
from lctrain.models.window import refuse_cut_keys

HALF = ("torch.bfloat16", "torch.float16")


def require_batching(model: Any) -> InputHook:
    """Returns the input hook of a model that continuous batching can serve.

    Args:
        model: A causal LM of transformers whose config names an attention of lctrain.

    Raises:
        ValueError: if the model is not patched, its layers cannot read a paged cache, or the cache
            would forget keys.
    """
    name = model.config._attn_implementation
    hook = input_hook(model, name)
    if hook is None:
        raise ValueError(
            f"the attention must be named when a model is loaded, or by patch_model, got {name} in "
            f"the config of {type(model).__name__}, which was not checked. Call "
            "lctrain.patch_model(model)."
        )
    if length_dependent(model) and name != "lctrain_dual_chunk":
        raise _refusal(model, "RoPE frequencies that depend on the length")
    refuse_cut_keys(model)
    counts = counts_positions_itself(model) or embeddings_read_mask(model)
    if counts or "position_ids" not in parameters(model):
        raise _refusal(model, "positions that the model counts itself")
    for layer in attention_layers(model).values():
        width, value_width = _widths(layer)
        if width != value_width:
            raise _refusal(model, f"values of {value_width} columns and keys of {width}")
        if getattr(getattr(layer, SPEC_ATTRIBUTE, None), "backend", None) == "hopper":
            raise ValueError(
                "backend must be 'auto', 'triton' or 'pytorch' for continuous batching, got "
                "'hopper', which has no decode kernels. Patch the model with backend='auto'."
            )
    if model.device.type == "cuda" and str(model.dtype) not in HALF:
        raise ValueError(
            f"weights must be bfloat16 or float16 for continuous batching on a GPU, got "
            f"{model.dtype}, for which there are no decode kernels. Call model.bfloat16()."
        )
    return hook


def input_hook(model: Any, name: str) -> InputHook | None:
    """Returns a model's input hook, and prepares the hook of a model loaded by name.

    Args:
        model: A model of transformers.
        name: Name of its attention in transformers.

    Returns:
        The hook; None if the model was neither patched nor loaded with that attention.
    """
    for hook in model._forward_pre_hooks.values():
        if isinstance(hook, InputHook):
            return hook
    for hook in model._forward_pre_hooks.values():
        if isinstance(hook, LateHook) and hook.implementation == name:
            if hook.hook is None:
                prepare(model, name)
            return hook.hook
    return None


def _widths(layer: nn.Module) -> tuple[int, int]:
    """Returns the widths (keys, values) of a layer's heads; both alike if it states one."""
    found = [getattr(layer, name, None) for name in ("qk_head_dim", "head_dim", "v_head_dim")]
    latent, plain, value = (width if isinstance(width, int) else None for width in found)
    width = latent or plain or value or 0
    return width, value or width


def _refusal(model: Any, what: str) -> ValueError:
    return ValueError(
        f"a paged cache must hold keys and values of equal width at positions that continuous "
        f"batching counts, got {what} in {type(model).__name__}. Call generate() instead."
    )
