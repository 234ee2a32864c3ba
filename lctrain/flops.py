"""Model FLOPs of a packed batch from its document lengths, and the peaks of known accelerators."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

# Dense bf16 matrix FLOP/s of the vendors' data sheets (without sparsity), the first substring of
# the device's name that fits.
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
    """Dense bf16 peak of an accelerator in FLOP/s, or None for one that is not in the table."""
    for fragment, peak in PEAK_BF16_FLOPS:
        if fragment.lower() in device_name.lower():
            return peak
    return None


@dataclass(frozen=True)
class FlopCounter:
    """FLOPs of one training step of a decoder (forward, and twice that backward).

    Six per token and matrix weight (the embedding look-up is free, the output projection is not),
    and per attention layer 12 * attention_width for every visible (query, key) pair: QK^T and PV
    are two FLOPs each per element, times three. What activation checkpointing computes again is not
    counted.

    Attributes:
        matrix_parameters: Weights that multiply every token.
        attention_width: Mean over keys and values of heads * their width; heads * head_dim, where
            both are as wide.
        windows: Number of keys that a query sees, per layer; None for all keys before it.
    """

    matrix_parameters: float
    attention_width: float
    windows: tuple[int | None, ...]

    @classmethod
    def of(cls, model: nn.Module) -> FlopCounter:
        """Reads the sizes from a transformers causal LM.

        Weights of experts count by the share that a token uses.

        Args:
            model: Model with a `config`; without one, attention is not counted.
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

    def step_flops(self, lengths: Iterable[int]) -> float:
        """FLOPs of forward and backward over one pack.

        Args:
            lengths: Tokens of each document.
        """
        lengths = list(lengths)
        dense = 6.0 * self.matrix_parameters * sum(lengths)
        pairs = sum(
            count * sum(visible_pairs(length, window) for length in lengths)
            for window, count in _counts(self.windows).items()
        )
        return dense + 12.0 * self.attention_width * pairs


def _value_dim(config: Any, head_dim: int) -> int:
    """Returns the columns of a query head's values: twice the head dim in version 1."""
    return 2 * head_dim if getattr(config, "model_type", None) == "diffllama" else head_dim


def visible_pairs(length: int, window: int | None) -> int:
    """(query, key) pairs of causal attention over one document, each query seeing `window` keys."""
    seen = length if window is None else min(window, length)
    return seen * (seen + 1) // 2 + (length - seen) * seen


def _matrix_parameters(model: nn.Module, config: Any) -> float:
    """Parameters of matrices that multiply every token."""
    inputs = getattr(model, "get_input_embeddings", lambda: None)()
    outputs = getattr(model, "get_output_embeddings", lambda: None)()
    looked_up = {id(inputs.weight)} if inputs is not None else set()
    if outputs is not None:
        looked_up.discard(id(outputs.weight))  # tied: the same weights project to the vocabulary
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    active = getattr(config, "num_experts_per_tok", None)
    total = 0.0
    for name, weight in model.named_parameters():
        if weight.dim() < 2 or id(weight) in looked_up:
            continue
        share = active / experts if experts and active and ".experts." in name else 1.0
        total += math.prod(weight.shape) * share
    return total


def _window(config: Any, layer: int) -> int | None:
    """Sliding window of a layer, None where attention is full."""
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
