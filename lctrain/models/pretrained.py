"""Loads language models from the Hugging Face hub or a folder; errors name the model."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from lctrain.config import PretrainedModelConfig
from lctrain.distributed import Topology
from lctrain.distributed.sharding import (
    has_parameters_on_meta,
    is_to_be_sharded,
    parameters_on_meta,
)
from lctrain.model_names import check_model_name
from lctrain.models.unread import (
    WholeOnlyError,
    mark_unread,
    read_generation_config,
    safetensors_files,
)

log = logging.getLogger(__name__)

DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_pretrained(
    config: PretrainedModelConfig,
    dtype: str = "auto",
    quantization: Any = None,
    task: str = "causal",
    is_whole: bool = False,
) -> Any:
    """Loads a language model in evaluation mode, straight to torch's default device.

    Inside `built_to_be_sharded`, the parameters of a model in safetensors files are on device meta,
    and `shard_model` reads them. Other models are loaded on rank 0.

    Args:
        config: Config of the pretrained model.
        dtype: Dtype of the weights: auto (as they are stored), float32, bfloat16 or float16.
        quantization: Quantization config of transformers; None loads the weights as they are.
        task: "causal", or "mlm" for a masked language model.
        is_whole: Whether rank 0 loads all weights even inside `built_to_be_sharded`.

    Raises:
        ValueError: if the model does not exist, is damaged or no causal LM, lacks a weight, or the
            dtype is unknown.
    """
    check_dtype(dtype)
    if is_to_be_sharded() and not is_whole and quantization is None:
        unread = _load_unread(config, dtype, task)
        if unread is not None:
            return unread.eval()
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
    _refuse_missing(config, sorted(found["missing_keys"]))
    return model.eval()


def _refuse_missing(config: PretrainedModelConfig, missing: list[str]) -> None:
    if missing:
        raise ValueError(
            f"model must hold every weight, got {config.name_or_path} without {len(missing)} of "
            f"them, {missing[0]} among them, for which transformers takes random numbers. Restore "
            "its files, or correct its config.json."
        )


def _load_unread(config: PretrainedModelConfig, dtype: str, task: str) -> Any:
    """Returns the model of `load_pretrained` with stored parameters on device meta.

    All ranks call it, and all return a model, or all return None: then the weights can only be
    loaded whole.

    Raises:
        ValueError: on all ranks, as in `load_pretrained`.
    """
    ranks = Topology.of_process()
    model = error = reason = None
    try:
        with parameters_on_meta():
            model = load_architecture(config, dtype, task)
        with _naming(config):
            files = safetensors_files(config.name_or_path, config.revision)
            missing = mark_unread(model, files, config.name_or_path)
            read_generation_config(model, config.name_or_path, config.revision)
        _refuse_missing(config, missing)
    except WholeOnlyError as found:
        reason = str(found)
    except ValueError as found:
        error = found
    outcomes = ranks.gather((None if error is None else str(error), reason))
    for message, _ in outcomes:
        if message is not None:
            raise error or ValueError(message)
    reasons = [why for _, why in outcomes if why is not None]
    if reasons and ranks.is_first:
        log.info("Rank 0 loads all weights of %s: %s.", config.name_or_path, reasons[0])
    return None if reasons else model


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
    with _naming(config):
        architecture = _stored_config(config)
        return auto_class(task).from_config(
            architecture,
            trust_remote_code=config.trust_remote_code,
            **({} if dtype == "auto" else {"dtype": getattr(torch, dtype)}),
        )


def stored_task(config: PretrainedModelConfig) -> str:
    """Returns "mlm" if a stored model is a masked language model, else "causal".

    Args:
        config: Config of the pretrained model.

    Raises:
        ValueError: if the model does not exist.
    """
    with _naming(config):
        architecture = _stored_config(config)
    names = getattr(architecture, "architectures", None) or []
    return "mlm" if any(str(name).endswith("ForMaskedLM") for name in names) else "causal"


def _stored_config(config: PretrainedModelConfig) -> Any:
    """Returns transformers' configuration of a stored model; that of its base for adapters."""
    from transformers import AutoConfig

    trust = config.trust_remote_code
    revision = config.revision or "main"
    try:
        return AutoConfig.from_pretrained(
            config.name_or_path, revision=revision, trust_remote_code=trust
        )
    except (OSError, ValueError):
        base = _base_of_adapters(config.name_or_path, revision)
        if base is None:
            raise
    return AutoConfig.from_pretrained(base, trust_remote_code=trust)


def _base_of_adapters(name: str, revision: str) -> str | None:
    """Returns the name of the model that stored adapters are for; None if there are no adapters."""
    from transformers.utils.peft_utils import find_adapter_config_file

    path = find_adapter_config_file(name, revision=revision)
    if path is None:
        return None
    base: str | None = json.loads(Path(path).read_text(encoding="utf-8")).get(
        "base_model_name_or_path"
    )
    if not base:
        raise ValueError(
            "adapter_config.json must name the base model, got none. Set base_model_name_or_path"
        )
    return base


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
