"""Configs of the models of version 2: those of their families, under a model_type of their own.

Imports transformers' configs only; `lctrain.models` reaches it lazily.
"""

from typing import Any

from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config


class LlamaDifferentialConfig(LlamaConfig):
    """LlamaConfig; num_attention_heads counts both branches."""

    model_type = "lctrain_llama_diff"


class MistralDifferentialConfig(MistralConfig):
    """MistralConfig; num_attention_heads counts both branches."""

    model_type = "lctrain_mistral_diff"


class Qwen2DifferentialConfig(Qwen2Config):
    """Qwen2Config; num_attention_heads counts both branches."""

    model_type = "lctrain_qwen2_diff"


class Qwen3DifferentialConfig(Qwen3Config):
    """Qwen3Config; num_attention_heads counts both branches."""

    model_type = "lctrain_qwen3_diff"


CONFIGS: dict[str, Any] = {
    "llama": LlamaDifferentialConfig,
    "mistral": MistralDifferentialConfig,
    "qwen2": Qwen2DifferentialConfig,
    "qwen3": Qwen3DifferentialConfig,
}
"""model_type of a family -> its config of version 2."""


def differential_config(config: Any) -> Any:
    """Returns the config of version 2 that has every head of `config` as a pair.

    Args:
        config: Configuration of a family in CONFIGS.

    Raises:
        ValueError: if the family has no version 2.
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
