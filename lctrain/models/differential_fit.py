"""Prepares a model for differential attention: checks its layers, and replaces DiffLlama's."""

from collections.abc import Callable
from typing import Any

from torch import nn

from lctrain.attention.spec import DifferentialSpec
from lctrain.models.architectures import attention_layers


def fit_differential(model: Any, spec: DifferentialSpec) -> DifferentialSpec:
    """Checks that a model's attention layers are differential, and of supported sizes.

    Args:
        model: A transformers model that attention="flash" supports.
        spec: Options of the attention from the user.

    Returns:
        The options, unchanged.

    Raises:
        ValueError: if a layer is not differential, or its head dim is too large for the kernels.
    """
    from lctrain_kernels.differential.checks import MAX_HEAD_DIM

    for layer in attention_layers(model).values():
        if not _is_differential(layer):
            raise ValueError(
                "model must have differential attention layers for attention='differential', got "
                f"{type(model).__name__} with {type(layer).__name__}. Make it differential with "
                "lctrain.models.differential.to_differential(model), load a DiffLlama, or choose "
                "attention='flash'."
            )
        head_dim = getattr(layer, "head_dim", 0)
        if head_dim > MAX_HEAD_DIM:
            raise ValueError(
                f"head_dim must be at most {MAX_HEAD_DIM} for differential attention, got "
                f"{head_dim}. Patch the model with attention='flash', which attends in several "
                "calls."
            )
    return spec


def refuse_differential_layers(model: Any) -> None:
    """Raises a ValueError if a model has differential layers, for attention="dual_chunk"."""
    found = {type(m).__name__ for m in attention_layers(model).values() if _is_differential(m)}
    if found:
        raise ValueError(
            "model must not be differential for attention='dual_chunk', got "
            f"{', '.join(sorted(found))}: the kernels have one or the other. Patch it with "
            "attention='differential', and extend its window by the config's rope_parameters "
            "(YaRN, for example)."
        )


def fuse_layers(layers: dict[str, nn.Module]) -> Callable[[], None]:
    """Sets the class of DiffLlama's attention layers to FusedDiffLlamaAttention.

    Differential layers of version 2 keep their class: they call the kernels through the attention
    function.

    Args:
        layers: Attention layers of the model, by name.

    Returns:
        A function that restores the classes.
    """
    from transformers.models.diffllama.modeling_diffllama import DiffLlamaAttention

    from lctrain.models.differential_v1 import FusedDiffLlamaAttention

    fused = [layer for layer in layers.values() if type(layer) is DiffLlamaAttention]
    for layer in fused:
        layer.__class__ = FusedDiffLlamaAttention

    def undo() -> None:
        for layer in fused:
            layer.__class__ = DiffLlamaAttention

    return undo


def _is_differential(layer: nn.Module) -> bool:
    from transformers.models.diffllama.modeling_diffllama import DiffLlamaAttention

    from lctrain.models.differential_v1 import FusedDiffLlamaAttention
    from lctrain.models.differential_v2 import DifferentialAttention

    known = (DiffLlamaAttention, FusedDiffLlamaAttention)
    return type(layer) in known or isinstance(layer, DifferentialAttention)
