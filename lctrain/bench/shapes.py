"""Shapes of the models whose training step is timed, built from a configuration with no network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class ModelShape:
    """Shape of a causal language model of transformers.

    Attributes:
        name: Name on the command line, in `--shapes`.
        title: Name in tables and records.
        model_type: transformers' name of the family.
        settings: Arguments of the family's configuration class.
    """

    name: str
    title: str
    model_type: str
    settings: Mapping[str, Any]

    @property
    def vocab_size(self) -> int:
        """Number of tokens in the vocabulary."""
        return int(self.settings["vocab_size"])


def _settings(hidden: int, layers: int, heads: int, heads_kv: int, head_dim: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads_kv,
        "head_dim": head_dim,
        "max_position_embeddings": 131_072,
        "tie_word_embeddings": True,
        "use_cache": False,
    }


_ALL = (
    ModelShape(
        "llama-1b",
        "Llama-3.2-1B",
        "llama",
        {
            **_settings(2048, 16, 32, 8, 64),
            "intermediate_size": 8192,
            "vocab_size": 128_256,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
        },
    ),
    ModelShape(
        "qwen3-1.7b",
        "Qwen3-1.7B",
        "qwen3",
        {
            **_settings(2048, 28, 16, 8, 128),
            "intermediate_size": 6144,
            "vocab_size": 151_936,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        },
    ),
)
SHAPES = {shape.name: shape for shape in _ALL}

llama_8b = ModelShape(
    "llama-8b",
    "Llama-3.1-8B",
    "llama",
    {
        **_settings(4096, 32, 32, 8, 128),
        "intermediate_size": 14_336,
        "vocab_size": 128_256,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
    },
)

llama_100m = ModelShape(
    "llama-100m",
    "Llama, 100M",
    "llama",
    {
        **_settings(768, 12, 12, 4, 64),
        "intermediate_size": 2048,
        "vocab_size": 32_768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
    },
)

llama_135m = ModelShape(
    "llama-135m",
    "SmolLM2-135M",
    "llama",
    {
        **_settings(576, 30, 9, 3, 64),
        "intermediate_size": 1536,
        "vocab_size": 49_152,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
    },
)


def tiny(shape: ModelShape, vocab_size: int = 256) -> ModelShape:
    """Returns the shape with two narrow layers and a small vocabulary, for a trial on a CPU."""
    small = {**_settings(64, 2, 4, 2, 16), "intermediate_size": 96, "vocab_size": vocab_size}
    return replace(shape, title=f"{shape.title}, tiny", settings={**shape.settings, **small})


def build_shape(
    shape: ModelShape, implementation: str, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> Any:
    """Builds a model with random weights, in training mode.

    Args:
        shape: Shape of the model.
        implementation: transformers' name of the attention.
        device: Device on which the weights are drawn.
        dtype: Dtype of the weights.
        seed: Seed of the weights.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            CONFIG_MAPPING[shape.model_type](**shape.settings),
            dtype=dtype,
            attn_implementation=implementation,
        )
    return model.to(device).train()  # in case transformers did not build it on this device
