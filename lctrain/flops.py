"""Counts the model FLOPs of a packed batch, and lists the peak FLOP/s of known accelerators."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from lctrain.experts import experts_per_token, token_shares

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
class FlopCounter:
    """Counter of the model FLOPs of a training step of a decoder: forward and backward.

    A step takes 6 FLOPs per token and matrix weight: 2 in the forward and 4 in the backward. The
    output projection counts as a matrix, the embedding look-up does not. Each attention layer takes
    12 * attention_width FLOPs per visible (query, key) pair: 2 * attention_width for QK^T, as many
    for PV, and twice both in the backward. Recomputation by activation checkpointing is not
    counted.

    Attributes:
        matrix_parameters: Number of matrix weights that multiply every token.
        attention_width: Number of query heads times the mean of the head dims of keys and values.
        windows: Number of keys that a query sees in each layer; None for all keys up to the query.
    """

    matrix_parameters: float
    attention_width: float
    windows: tuple[int | None, ...]

    @classmethod
    def of(cls, model: nn.Module) -> FlopCounter:
        """Builds a counter from the sizes of a transformers causal LM.

        Weights of experts are counted by the fraction of experts that a token uses.

        Args:
            model: Model with an attribute `config`. Without it, attention is not counted.
        """
        config = getattr(model, "config", None)
        layers = getattr(config, "num_hidden_layers", 0)
        heads = getattr(config, "num_attention_heads", 0) or 0
        head_dim = getattr(config, "head_dim", None) or (
            getattr(config, "hidden_size", 0) // heads if heads else 0
        )
        return cls(
            matrix_parameters=_matrix_parameters(model, config),
            attention_width=heads * (head_dim + _value_dim(config, head_dim)) / 2,
            windows=tuple(_window(config, layer) for layer in range(layers)),
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
        pairs = sum(
            count * sum(visible_pairs(length, window) for length in lengths)
            for window, count in _counts(self.windows).items()
        )
        shared = sum(
            lengths[parent] * length
            for parent, length in zip(parents, lengths, strict=False)
            if parent >= 0
        )
        return dense + 12.0 * self.attention_width * (pairs + len(self.windows) * shared)


def _value_dim(config: Any, head_dim: int) -> int:
    """Returns the width of a head's values: twice the head dim in DiffLlama, else the head dim."""
    return 2 * head_dim if getattr(config, "model_type", None) == "diffllama" else head_dim


def visible_pairs(length: int, window: int | None) -> int:
    """Returns the number of (query, key) pairs in causal attention over one document.

    Args:
        length: Number of tokens of the document.
        window: Largest number of keys that a query sees, itself included; None for no limit.
    """
    seen = length if window is None else min(window, length)
    return seen * (seen + 1) // 2 + (length - seen) * seen


def _matrix_parameters(model: nn.Module, config: Any) -> float:
    """Returns the number of matrix weights that multiply every token."""
    inputs = getattr(model, "get_input_embeddings", lambda: None)()
    outputs = getattr(model, "get_output_embeddings", lambda: None)()
    looked_up = {id(inputs.weight)} if inputs is not None else set()
    if outputs is not None:
        looked_up.discard(id(outputs.weight))  # tied: the same weights project to the vocabulary
    shares = _expert_shares(model, config)
    total = 0.0
    for weight in model.parameters():
        if weight.dim() < 2 or id(weight) in looked_up:
            continue
        total += math.prod(weight.shape) * shares.get(id(weight), 1.0)
    return total


def _expert_shares(model: nn.Module, config: Any) -> dict[int, float]:
    """Returns the fraction of tokens that each expert's weight multiplies, by the weight's id."""
    shares: dict[int, float] = {}
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    for index, layer in (numbered for layers in lists for numbered in enumerate(layers)):
        shares |= token_shares(layer, experts_per_token(config, index))
    return shares


def _window(config: Any, layer: int) -> int | None:
    """Returns the sliding window of a layer in tokens; None for full attention."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is not None:
        return window if types[layer] == "sliding_attention" else None
    return window if getattr(config, "use_sliding_window", True) else None


def _counts(windows: Iterable[int | None]) -> dict[int | None, int]:
    counts: dict[int | None, int] = {}
    for window in windows:
        counts[window] = counts.get(window, 0) + 1
    return counts
