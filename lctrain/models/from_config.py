"""Builds a causal LM from its name or its configuration, as YAML files and checkpoints hold it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lctrain.config import PretrainedModelConfig
from lctrain.models.pretrained import auto_class, load_pretrained


def model_from(
    description: str | Mapping[str, Any], vocab_size: int | None = None, task: str = "causal"
) -> Any:
    """Builds a transformers language model in float32.

    Args:
        description: Name or path of a pretrained model; or a configuration, a mapping with
            `model_type`, for a model with random weights.
        vocab_size: Vocabulary size for a configuration without `vocab_size`; None takes the default
            of the model's family.
        task: "causal", or "mlm" for a masked language model.

    Raises:
        ValueError: if the model, its family or an argument of the configuration does not exist.
    """
    if isinstance(description, str):
        return load_pretrained(
            PretrainedModelConfig(name_or_path=description), "float32", task=task
        )
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    from lctrain.models.registration import register_families

    register_families()
    settings = dict(description)
    family = settings.pop("model_type", None)
    if family not in CONFIG_MAPPING:
        raise ValueError(
            f"model must have the model_type of a family of transformers, got {family!r}. Add for "
            "example model_type: llama."
        )
    config_class = CONFIG_MAPPING[family]
    if vocab_size is not None:
        settings.setdefault("vocab_size", vocab_size)
    try:
        config = config_class(**settings)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ValueError(f"model must fit {config_class.__name__}: {error}") from error
    return auto_class(task).from_config(config, dtype=torch.float32)


def describe(model: Any) -> dict[str, Any] | None:
    """Returns a model's configuration as a mapping, from which `model_from` builds the model.

    Returns None for models with adapters, wrapped models, and models that are not from
    transformers.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or getattr(model, "_hf_peft_config_loaded", False):
        return None  # a configuration does not describe adapters
    return model.config.to_dict()


def vocab_size_of(datamodule: Any) -> int | None:
    """Returns the vocabulary size of a data module's tokenizer; None if it has none.

    Args:
        datamodule: The data module; None for none.
    """
    tokenizer = getattr(datamodule, "tokenizer", None)
    return None if tokenizer is None or isinstance(tokenizer, str) else len(tokenizer)
