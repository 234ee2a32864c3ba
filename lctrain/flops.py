"""Counts the model FLOPs of a packed batch, and lists the peak FLOP/s of known accelerators."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from lctrain.experts import experts_per_token, text_config, token_shares

# Dense bf16 matrix FLOP/s from the vendors' data sheets, without sparsity. The first entry whose
# name is a part of the device's name applies.
PEAK_BF16_FLOPS: tuple[tuple[str, float], ...] = (
    ("B200", 2.25e15),  # NVIDIA DGX B200 data sheet: 36 PFLOP/s of 8 GPUs with sparsity
    ("H200 NVL", 835.5e12),  # NVIDIA H200 data sheet: 1,671 with sparsity
    ("H200", 989.5e12),  # NVIDIA H200 data sheet, SXM: 1,979 with sparsity
    ("H100 NVL", 835.5e12),  # NVIDIA H100 data sheet: 1,671 with sparsity
    ("H100 PCIe", 756.5e12),  # NVIDIA H100 PCIe product brief: 1,513 with sparsity
    ("H100", 989.5e12),  # NVIDIA H100 data sheet, SXM: 1,979 with sparsity
    ("A100", 312e12),  # NVIDIA A100 data sheet, all variants
    ("MI300X", 1307.4e12),  # AMD Instinct MI300X data sheet
)


def peak_flops(device_name: str) -> float | None:
    """Returns an accelerator's dense bf16 peak in FLOP/s; None if it is not in the table."""
    for fragment, peak in PEAK_BF16_FLOPS:
        if fragment.lower() in device_name.lower():
            return peak
    return None


@dataclass(frozen=True)
class AttentionLayer:
    """Sizes of a layer's attention that decide its FLOPs.

    Attributes:
        width: Number of query heads times the mean of the head dims of keys and values; 0 in a
            layer without attention over keys, such as one of Mamba.
        window: Largest number of keys that a query sees, itself included; None for no limit.
        chunk: Number of tokens of a chunk, if queries see only the keys of their own chunk.
    """

    width: float
    window: int | None = None
    chunk: int | None = None


@dataclass(frozen=True)
class FlopCounter:
    """Counter of the model FLOPs of a training step of a decoder: forward and backward.

    A step takes 6 FLOPs per token and matrix weight: 2 in the forward and 4 in the backward. The
    output projection counts as a matrix, the embedding look-up does not. Each attention layer takes
    12 * width FLOPs per visible (query, key) pair: 2 * width for QK^T, as many for PV, and twice
    both in the backward. Recomputation by activation checkpointing and the states of recurrent
    layers are not counted. Layers that choose their keys count as if they saw all of them.

    Attributes:
        matrix_parameters: Number of matrix weights that multiply every token.
        layers: Attention of every layer.
    """

    matrix_parameters: float
    layers: tuple[AttentionLayer, ...]

    @classmethod
    def of(cls, model: nn.Module) -> FlopCounter:
        """Builds a counter from the sizes of a transformers causal LM.

        Weights of experts are counted by the fraction of experts that a token uses.

        Args:
            model: Model with an attribute `config`. Without it, attention is not counted.
        """
        config = getattr(model, "config", None)
        number = getattr(text_config(config), "num_hidden_layers", 0)
        return cls(
            matrix_parameters=_matrix_parameters(model, config),
            layers=tuple(_attention(config, layer) for layer in range(number)),
        )

    def step_flops(self, lengths: Iterable[int], parents: Iterable[int] = ()) -> float:
        """Returns the FLOPs of forward and backward over one pack.

        Args:
            lengths: Number of tokens of each document.
            parents: Index of the prefix that each document attends to, or -1, as in
                `PrefixGroups`; empty if no documents share a prefix.
        """
        lengths = list(lengths)
        dense = 6.0 * self.matrix_parameters * sum(lengths)
        shared = sum(
            lengths[parent] * length
            for parent, length in zip(parents, lengths, strict=False)
            if parent >= 0
        )
        pairs = sum(
            count
            * layer.width
            * (shared + sum(visible_pairs(length, layer.window, layer.chunk) for length in lengths))
            for layer, count in Counter(self.layers).items()
        )
        return dense + 12.0 * pairs


def visible_pairs(length: int, window: int | None, chunk: int | None = None) -> int:
    """Returns the number of (query, key) pairs in causal attention over one document.

    Args:
        length: Number of tokens of the document.
        window: Largest number of keys that a query sees, itself included; None for no limit.
        chunk: Number of tokens of a chunk, if queries see only the keys of their own chunk.
    """
    if chunk is not None:
        whole, rest = divmod(length, chunk)
        return whole * visible_pairs(chunk, window) + visible_pairs(rest, window)
    seen = length if window is None else min(window, length)
    return seen * (seen + 1) // 2 + (length - seen) * seen


def _matrix_parameters(model: nn.Module, config: Any) -> float:
    """Returns the number of matrix weights that multiply every token."""
    outputs = getattr(model, "get_output_embeddings", lambda: None)()
    tables = (module.weight for module in model.modules() if isinstance(module, nn.Embedding))
    skipped = set(map(id, tables)) | _replaced(model)
    if outputs is not None:
        skipped.discard(id(outputs.weight))  # tied: the same weights project to the vocabulary
    shares = _expert_shares(model, config)
    total = 0.0
    for name, weight in model.named_parameters():
        if weight.dim() < 2 or id(weight) in skipped or name.endswith("bias"):  # [experts, N]
            continue
        total += math.prod(weight.shape) * shares.get(id(weight), 1.0)
    return total


def _replaced(model: nn.Module) -> set[int]:
    """Returns the ids of weights in whose place peft trains copies: its `modules_to_save`."""
    kept = [getattr(m, "original_module", None) for m in model.modules()]
    return {id(weight) for m in kept if isinstance(m, nn.Module) for weight in m.parameters()}


def _expert_shares(model: nn.Module, config: Any) -> dict[int, float]:
    """Returns the fraction of tokens that each expert's weight multiplies, by the weight's id.

    The outermost lists of modules hold the layers. Lists inside a layer number other things, such
    as its experts.
    """
    shares = token_shares(model, experts_per_token(config))
    lists = [
        (n, module) for n, module in model.named_modules() if isinstance(module, nn.ModuleList)
    ]
    names = {name for name, _ in lists}
    for name, layers in lists:
        parts = name.split(".")
        if any(".".join(parts[:end]) in names for end in range(1, len(parts))):
            continue
        for index, layer in enumerate(layers):
            shares |= token_shares(layer, experts_per_token(config, index))
    return shares


_WITHOUT_ATTENTION = {"linear_attention", "mamba", "recurrent", "conv", "moe", "mlp"}
"""Types of layers that do not attend to keys."""
_SLIDING = {"sliding_attention", "hybrid_sliding"}


def _attention(config: Any, layer: int) -> AttentionLayer:
    """Returns the sizes of a layer's attention, from the layer's own configuration."""
    config = text_config(config, layer)
    types = getattr(config, "layer_types", None)
    kind = types[layer] if types is not None else None
    if kind in _WITHOUT_ATTENTION:
        return AttentionLayer(0.0)
    width = _width(config, kind in _SLIDING, layer)
    window = getattr(config, "sliding_window", None) or None  # Qwen2-MoE writes 0 for none
    chunk = getattr(config, "attention_chunk_size", None)
    if kind is None:
        return AttentionLayer(
            width, window if getattr(config, "use_sliding_window", True) else None, chunk
        )
    return AttentionLayer(
        width,
        window if kind in _SLIDING else None,
        chunk if kind == "chunked_attention" else None,
    )


def _width(config: Any, sliding: bool, layer: int) -> float:
    """Returns the number of query heads times the mean of the head dims of keys and values.

    Args:
        config: Configuration of a layer.
        sliding: Whether the layer has a window. Some families give these layers other heads.
        layer: Number of the layer. Laguna lists the heads of each.
    """

    def size(name: str) -> int:
        own = getattr(config, f"swa_{name}", None) if sliding else None
        found = own or getattr(config, name, None)
        return found if isinstance(found, int) else 0

    listed = getattr(config, "num_attention_heads_per_layer", None)
    heads = listed[layer] if listed else size("num_attention_heads")
    if not heads:
        return 0.0
    keys = size("head_dim") or size("hidden_size") // heads
    if size("qk_nope_head_dim"):  # DeepSeek's latent attention: head_dim is that of the rotary part
        keys = size("qk_nope_head_dim") + size("qk_rope_head_dim")
    values = size("v_head_dim") or keys
    if getattr(config, "model_type", None) == "diffllama":
        values = 2 * keys
    return heads * (keys + values) / 2
