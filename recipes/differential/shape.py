"""Builds the models whose training step is timed: plain, V1 and V2 with one shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Shape:
    """Shape of a Llama, and the change that gives V2 the same number of parameters.

    Attributes:
        layers: Number of decoder layers.
        hidden_size: Width of the hidden states.
        heads: Query heads of head dim 64; V1 uses them as the branches of heads / 2 pairs.
        heads_kv: Key/value heads.
        intermediate_size: Width of the feed-forward layers.
        v2_intermediate_size: Width of V2's feed-forward layers, which is smaller, since its query
            projections are larger.
        vocab_size: Number of tokens in the vocabulary.
        max_tokens: Number of positions.
    """

    layers: int
    hidden_size: int
    heads: int
    heads_kv: int
    intermediate_size: int
    v2_intermediate_size: int
    vocab_size: int
    max_tokens: int = 131072


SHAPES = {
    "1b": Shape(16, 2048, 32, 8, 8192, 7552, 128256),  # Llama-3.2-1B
    "tiny": Shape(2, 128, 2, 2, 85, 43, 512),
}


def build_step_model(
    shape: Shape, version: int, implementation: str, device: torch.device, dtype: torch.dtype
) -> Any:
    """Builds a model with random weights, in training mode.

    Args:
        shape: Shape of the model.
        version: 0 for the plain Llama, 1 for DiffLlama, 2 for V2, a Llama with differential
            attention.
        implementation: transformers' name of the attention, before any patch.
        device: Device of the model.
        dtype: Dtype of the weights.
    """
    from transformers import AutoModelForCausalLM, DiffLlamaConfig, LlamaConfig

    from lctrain.models.differential_configs import differential_config
    from lctrain.models.registration import register_families

    settings: dict[str, Any] = {
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden_size,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads_kv,
        "head_dim": shape.hidden_size // shape.heads,
        "intermediate_size": shape.v2_intermediate_size
        if version == 2
        else shape.intermediate_size,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_tokens,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "tie_word_embeddings": True,
        "use_cache": False,
    }
    config: Any = DiffLlamaConfig(**settings) if version == 1 else LlamaConfig(**settings)
    if version == 2:
        register_families()
        config = differential_config(config)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=implementation
        )
    return model.to(device).train()  # in case transformers did not build it on this device
