"""Configs of differential models (version 2), one per family, each with its own model_type.

This module imports transformers' configs, so `lctrain.models` imports it only when it is needed.
"""

from typing import Any

from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config


class LlamaDifferentialConfig(LlamaConfig):
    """LlamaConfig whose num_attention_heads counts the query heads of both branches."""

    model_type = "lctrain_llama_diff"


class MistralDifferentialConfig(MistralConfig):
    """MistralConfig whose num_attention_heads counts the query heads of both branches."""

    model_type = "lctrain_mistral_diff"


class Qwen2DifferentialConfig(Qwen2Config):
    """Qwen2Config whose num_attention_heads counts the query heads of both branches."""

    model_type = "lctrain_qwen2_diff"


class Qwen3DifferentialConfig(Qwen3Config):
    """Qwen3Config whose num_attention_heads counts the query heads of both branches."""

    model_type = "lctrain_qwen3_diff"


CONFIGS: dict[str, Any] = {
    "llama": LlamaDifferentialConfig,
    "mistral": MistralDifferentialConfig,
    "qwen2": Qwen2DifferentialConfig,
    "qwen3": Qwen3DifferentialConfig,
}
"""model_type of a family -> config class of its differential models."""


def differential_config(config: Any) -> Any:
    """Returns the config of the differential model with a pair of heads for every query head.

    Args:
        config: Config of a plain model, of a family in CONFIGS.

    Raises:
        ValueError: if the family has no differential models of version 2.
    """
    if config.model_type not in CONFIGS:
        raise ValueError(
            f"model must be of one of the families {', '.join(CONFIGS)}, got {config.model_type}. "
            "For version 1 train a DiffLlama from scratch (model=diff_llama)."
        )
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    settings = config.to_dict() | {"num_attention_heads": 2 * heads, "head_dim": head_dim}
    for name in ("model_type", "architectures"):
        settings.pop(name, None)
    return CONFIGS[config.model_type].from_dict(settings)
