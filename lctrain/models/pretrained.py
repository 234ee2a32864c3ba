"""Loads causal LMs from the Hugging Face hub or a folder; errors name the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import Any

import torch

from lctrain.config import PretrainedModelConfig
from lctrain.distributed.sharding import has_parameters_on_meta
from lctrain.model_names import check_model_name

DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_pretrained(
    config: PretrainedModelConfig,
    dtype: str = "auto",
    quantization: Any = None,
    task: str = "causal",
) -> Any:
    """Loads a language model in evaluation mode, straight to torch's default device.

    Args:
        config: Config of the pretrained model.
        dtype: Dtype of the weights: auto (as they are stored), float32, bfloat16 or float16.
        quantization: Quantization config of transformers; None loads the weights as they are.
        task: "causal", or "mlm" for a masked language model.

    Raises:
        ValueError: if the model does not exist, is damaged or no causal LM, lacks a weight, or the
            dtype is unknown.
    """
    check_dtype(dtype)
    if has_parameters_on_meta():
        return load_architecture(config, dtype, task).eval()
    with _naming(config):
        loaded: Any = auto_class(task).from_pretrained(
            config.name_or_path,
            revision=config.revision or "main",
            trust_remote_code=config.trust_remote_code,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            output_loading_info=True,
            **({} if quantization is None else {"quantization_config": quantization}),
        )
    model, found = loaded
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"model must hold every weight, got {config.name_or_path} without {len(missing)} of "
            f"them, {missing[0]} among them, for which transformers takes random numbers. Restore "
            "its files, or correct its config.json."
        )
    return model.eval()


def load_architecture(
    config: PretrainedModelConfig, dtype: str = "auto", task: str = "causal"
) -> Any:
    """Builds the model of `load_pretrained` with random weights, on the current default device.

    Args:
        config: Config of the pretrained model.
        dtype: Dtype of the weights, as in `load_pretrained`.
        task: "causal", or "mlm" for a masked language model.

    Raises:
        ValueError: if the model does not exist, or is no causal LM.
    """
    from transformers import AutoConfig

    with _naming(config):
        architecture = AutoConfig.from_pretrained(
            config.name_or_path,
            revision=config.revision or "main",
            trust_remote_code=config.trust_remote_code,
        )
        return auto_class(task).from_config(
            architecture,
            trust_remote_code=config.trust_remote_code,
            **({} if dtype == "auto" else {"dtype": getattr(torch, dtype)}),
        )


def auto_class(task: str) -> Any:
    """Returns the Auto class of transformers that builds the models of a task."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    return AutoModelForMaskedLM if task == "mlm" else AutoModelForCausalLM


def check_dtype(dtype: str) -> None:
    """Raises a ValueError unless the dtype is one of DTYPES."""
    if dtype not in DTYPES:
        raise ValueError(
            f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}. auto takes what is stored."
        )


@contextmanager
def _naming(config: PretrainedModelConfig) -> Iterator[None]:
    """Turns errors of transformers, inside the context, into ValueErrors that name the model."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    check_model_name(config.name_or_path)
    damage = (EOFError, RuntimeError, SafetensorError, UnpicklingError)
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except damage as error:
        raise ValueError(
            f"model must hold intact weights of the shapes in its config, got "
            f"{config.name_or_path}, which cannot be loaded: {_first_line(error)}. Restore its "
            "files, or correct its config.json."
        ) from error
    except (OSError, StrictDataclassError, ValueError) as error:
        raise ValueError(
            "model must be a folder or a name on the Hugging Face hub, got "
            f"{config.name_or_path}, which cannot be loaded: {error}"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
