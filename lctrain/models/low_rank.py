"""Adds peft's low-rank adapters (LoRA, DoRA) to a pretrained model, and saves and restores them."""

from __future__ import annotations

from typing import Any

import torch

from lctrain.config.adapter import ALL_LINEAR, AdapterConfig, require_packages
from lctrain.model_names import resolved_name

_MARK = "lctrain_base_is_reloaded"
_REFUSED = {
    "gptq": "peft cannot merge adapters into GPTQ weights",
    "awq": "peft cannot merge adapters into AWQ weights",
    "fp8": "its products round activations to float8, which the gradient does not see",
    "fbgemm_fp8": "its products round activations to float8, which the gradient does not see",
}
_REFUSED_BY_EXPERTS = {
    "does not work with lora_dropout": "adapter.dropout must be 0",
    "does not work with use_dora": "adapter must be lora",
}
_TRAINABLE = ("bitsandbytes", "torchao")


def quantization_of(config: AdapterConfig | None) -> Any:
    """Returns transformers' quantization config of the frozen weights; None for dense weights.

    Args:
        config: Settings of the adapters; None for a model without adapters.

    Raises:
        ValueError: if the package of the quantized format is not installed.
    """
    if config is None or config.quantize is None:
        return None
    require_packages(config)
    import transformers

    if config.quantize == "nf4":
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    from torchao.quantization import Int8WeightOnlyConfig

    return transformers.TorchAoConfig(Int8WeightOnlyConfig())


def require_trainable_weights(architecture: Any, has_adapter: bool) -> None:
    """Raises ValueError for a pretrained model whose quantized weights cannot be trained on.

    Args:
        architecture: Configuration of the pretrained model.
        has_adapter: Whether adapters are trained instead of the weights.
    """
    found = getattr(architecture, "quantization_config", None)
    if found is None:
        return
    method = found.get("quant_method") if isinstance(found, dict) else found.quant_method
    method = str(getattr(method, "value", method) or "an unknown format")
    name = getattr(architecture, "_name_or_path", "") or "a model"
    if not any(method.startswith(known) for known in _TRAINABLE):
        reason = _REFUSED.get(method, "lctrain trains on those of bitsandbytes and torchao only")
        raise ValueError(
            f"model must have weights that adapters are trained on, got {name} in {method}: "
            f"{reason}. Load its weights in bfloat16; adapter.quantize=nf4 stores them in 4 bits."
        )
    if not has_adapter:
        raise ValueError(
            f"model must have weights that an optimizer can change, got {name} in {method}. Train "
            "adapters on it: adapter=lora."
        )


def add_adapter(model: Any, config: AdapterConfig) -> Any:
    """Returns a PeftModel: a pretrained model with frozen weights and trainable adapters.

    The adapters are float32, on the device of the weights. A checkpoint of the returned model holds
    the adapters only; the frozen weights are loaded again from their source.

    Args:
        model: A causal or masked LM of transformers; its layers are changed in place.
        config: Settings of the adapters.

    Raises:
        ValueError: if peft is not installed, or finds no layer of a given name.
    """
    require_packages(config)
    import peft

    whole = config.targets == [ALL_LINEAR]
    lora = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        use_dora=config.dora,
        target_modules=ALL_LINEAR if whole else list(config.targets),
        # peft has no task for masked language models.
        task_type="CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None,
    )
    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    try:
        adapted = peft.get_peft_model(model, lora)
    except ValueError as error:
        names = ", ".join(sorted(linear))
        for text, option in _REFUSED_BY_EXPERTS.items():
            if text in str(error):
                raise ValueError(
                    f"{option} for adapters of experts, got dropout={config.dropout} and dora="
                    f"{config.dora}. Or name other layers as adapter.targets: {names}."
                ) from error
        raise ValueError(
            f"adapter.targets must name linear layers of the model ({names}), "
            f"got {', '.join(config.targets)}: {error}"
        ) from error
    setattr(adapted, _MARK, True)
    resolve_base(adapted)
    return adapted


def resolve_base(model: Any) -> None:
    """Makes the base model's folder an absolute path in the configs of a PeftModel.

    Exported adapters then load from any working directory. Names on the hub are unchanged.
    """
    own = model.get_base_model().config
    own._name_or_path = resolved_name(getattr(own, "_name_or_path", None) or "")
    for config in model.peft_config.values():
        config.base_model_name_or_path = resolved_name(config.base_model_name_or_path or "") or None


_CASTS = "cast_input_dtype_enabled"  # peft's attribute of layers with adapters


def leave_casts_to_autocast(model: Any) -> list[Any]:
    """Lets adapters read their input in its own dtype, where autocast casts their weights.

    peft casts the input to float32, and autocast casts it back: the same values, with a copy of the
    input of every linear layer for the backward. Without autocast, dtypes would differ.

    Args:
        model: A PeftModel, or any other model, which has no such layers.

    Returns:
        The layers that have changed, for `restore_casts`.
    """
    changed = [module for module in model.modules() if getattr(module, _CASTS, False)]
    for module in changed:
        setattr(module, _CASTS, False)
    return changed


def restore_casts(layers: list[Any]) -> None:
    """Lets peft cast the inputs of layers again, as it does outside of autocast.

    Args:
        layers: What `leave_casts_to_autocast` returned; it is emptied.
    """
    while layers:
        setattr(layers.pop(), _CASTS, True)


def has_reloaded_base(model: Any) -> bool:
    """Returns whether a model comes from `add_adapter`, so that checkpoints hold adapters only."""
    return bool(getattr(model, _MARK, False))


def adapter_state(model: Any) -> dict[str, Any]:
    """Returns the trained tensors of a PeftModel, by the names that peft uses."""
    import peft

    return dict(peft.get_peft_model_state_dict(model, save_embedding_layers=False))


def load_adapter_state(model: Any, state: dict[str, Any]) -> None:
    """Restores the trained tensors of a PeftModel, in place.

    Args:
        model: The PeftModel.
        state: What `adapter_state` returned for a model of the same kind.

    Raises:
        ValueError: if the state is that of other adapters.
    """
    import peft

    known = adapter_state(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if shapes != {name: tuple(tensor.shape) for name, tensor in known.items()}:
        raise ValueError(
            "checkpoint must hold adapters of this model's targets and rank, got others. Use the "
            "adapter options of the checkpoint's run."
        )
    peft.set_peft_model_state_dict(model, state)
