"""The settings of the model: random weights, or a pretrained model."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from lctrain.config.schema import MISSING
from lctrain.limits import check_model_sizes, require

WEIGHT_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class ModelConfig:
    """Base class of `ScratchModelConfig` and `PretrainedModelConfig`.

    Attributes:
        dtype: Dtype of the weights: float32 or bfloat16. None takes bfloat16 for the frozen weights
            under adapters, and float32 without adapters.
    """

    dtype: str | None = None

    def __post_init__(self) -> None:
        require(
            self.dtype in (None, *WEIGHT_DTYPES),
            f"model.dtype must be null, {' or '.join(WEIGHT_DTYPES)}, got {self.dtype!r}. null "
            "takes float32, and bfloat16 under adapters.",
        )


@dataclass(frozen=True)
class ScratchModelConfig(ModelConfig):
    """Settings of a transformers causal LM with random weights.

    Attributes:
        model_type: Name of the model family in transformers, such as "llama" or "qwen3".
        config: Arguments of the family's configuration class. The default of `vocab_size` is the
            size of the tokenizer's vocabulary.
        differential: Version of differential attention. 2 replaces every attention head by a pair
            of heads, which doubles num_attention_heads; None changes nothing. For version 1, use
            model_type "diffllama".
    """

    model_type: str = MISSING
    config: dict[str, Any] = field(default_factory=dict)
    differential: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.differential in (None, 2),
            f"model.differential must be 2 or null, got {self.differential}. Version 1 is "
            "model=diff_llama.",
        )
        check_model_sizes(self.config)


@dataclass(frozen=True)
class PretrainedModelConfig(ModelConfig):
    """Settings of a transformers causal LM with trained weights.

    Attributes:
        name_or_path: Name on the Hugging Face hub, or a folder.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Whether to run the model's and the tokenizer's own code from the hub or
            the folder.
        allow_other_tokenizer: Whether to accept a data.tokenizer whose token ids differ from those
            of the model's tokenizer. The model's trained embeddings are then useless.
    """

    name_or_path: str = MISSING
    revision: str | None = None
    trust_remote_code: bool = False
    allow_other_tokenizer: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "name_or_path", os.path.expanduser(self.name_or_path))
