"""require_supported: checks whether a model can be patched; the error names the reason."""

import itertools
import re
import sys
from typing import Any

from torch import nn

from lctrain.models.code import hands_keywords_on, methods, parameters, strings, uses_name

_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
_INTERFACE = "ALL_ATTENTION_FUNCTIONS"
_MIXER = re.compile(
    r"Mamba|SSM|Rwkv|RWKV|Recurrent|DeltaNet|LinearAttention|LightningAttention|ShortConv|Retention"
    r"|xLSTM|MLSTM|Hyena|SsdMixer"
)


def attention_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the attention layers that use transformers' AttentionInterface, by name."""
    return {name: module for name, module in model.named_modules() if uses_name(module, _INTERFACE)}


def head_dims(model: nn.Module) -> list[int]:
    """Returns the different head dims of a model's attention layers, in rising order.

    If a layer's values are wider or narrower than its queries (multi-head latent attention), the
    larger width counts, since the kernels get both at that width. If no layer states a width, the
    result is [1].
    """
    found = set()
    for layer in attention_layers(model).values():
        widths = (getattr(layer, name, None) for name in ("head_dim", "qk_head_dim", "v_head_dim"))
        found.add(max((width for width in widths if isinstance(width, int)), default=1))
    return sorted(found) or [1]


def require_supported(model: Any) -> None:
    """Raises a ValueError with a remedy if a model cannot be patched.

    Args:
        model: Any object.

    Raises:
        ValueError: if `model` is not a transformers model, is a wrapper or an encoder-decoder, or
            has several modalities; or if tokens influence one another by anything except causal,
            full or sliding-window attention that is called through transformers'
            AttentionInterface.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ValueError(_not_a_model(model))
    name, config = type(model).__name__, model.config
    if model.main_input_name != "input_ids":
        raise ValueError(
            f"model must read input_ids, got {name}, which reads {model.main_input_name}. "
            f"{_advice_on_parts(model)}"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"model must be a causal language model or an encoder, got the encoder-decoder {name}. "
            "Patch its encoder alone: patch_model(model.get_encoder())."
        )
    inner = (module for module in model.modules() if isinstance(module, PreTrainedModel))
    parts = sorted({type(module).__name__ for module in inner if module.config is not config})
    if parts:
        raise ValueError(
            f"model must be one text model, got {name} with {', '.join(parts)}. "
            f"{_advice_on_parts(model)}"
        )
    layers = attention_layers(model)
    _require_attention_only(model, layers)
    _require_interface(model, layers)
    _require_windows(model, layers)
    _require_keyword_arguments(model, layers)
    _require_no_pattern(model)
    if getattr(config, "output_attentions", False):
        raise ValueError(
            "output_attentions must be False, got True in the model's config: the kernels never "
            "form the weights. Set config.output_attentions = False."
        )


def require_supported_class(model_class: Any) -> None:
    """Raises a ValueError if a model class cannot be patched, before a model is built.

    A class that does not use the AttentionInterface cannot call lctrain's attention.

    Args:
        model_class: A subclass of transformers' PreTrainedModel.
    """
    name = model_class.__name__
    tables = vars(sys.modules[model_class.__module__]).items()
    classes = [table for key, table in tables if key.endswith("_ATTENTION_CLASSES")]
    if classes:
        raise _no_interface(name, sorted({c.__name__ for table in classes for c in table.values()}))
    if not model_class._supports_flash_attn:
        raise _other_masks(name)


def _advice_on_parts(model: Any) -> str:
    """Returns the remedy for a model of several modalities: to patch its decoder, if possible."""
    from transformers import PreTrainedModel

    decoder = model.get_decoder()
    if decoder is model or not isinstance(decoder, PreTrainedModel):
        return "It has no language model of its own to patch: train it with one document per row."
    try:
        require_supported(decoder)
    except ValueError as error:
        return f"Its language model cannot be patched alone, either: {error}"
    return (
        "Patch its language model alone and call that by itself: decoder = model.get_decoder(), "
        "patch_model(decoder), decoder(**batch)."
    )


def _no_interface(name: str, foreign: list[str]) -> ValueError:
    return ValueError(
        f"model must call attention through transformers' AttentionInterface, got {name}, "
        f"which does not{' in ' + ', '.join(foreign) if foreign else ''}. Train it with "
        "attn_implementation='sdpa' and one document per row, or choose a model of a supported "
        "family such as Llama, Qwen3, Mistral, Gemma2 or Phi3."
    )


def _other_masks(name: str) -> ValueError:
    return ValueError(
        f"model must have masks that are causal or full, with windows, padding or packing, got "
        f"{name}, for which transformers says otherwise (_supports_flash_attn is False). Train "
        "it with attn_implementation='sdpa' and one document per row."
    )


def _not_a_model(model: Any) -> str:
    kind = type(model).__name__
    if hasattr(model, "get_base_model"):
        return (
            f"model must be a transformers PreTrainedModel, got {kind}. Patch the model inside: "
            "patch_model(model.get_base_model()); the adapters stay."
        )
    advice = {
        "OptimizedModule": "Patch the model before torch.compile.",
        "DistributedDataParallel": "Patch the model before wrapping it, or pass wrapper.module.",
        "FullyShardedDataParallel": "Patch the model before wrapping it, or pass wrapper.module.",
    }.get(kind, "Pass the transformers model itself, not what wraps it.")
    return f"model must be a transformers PreTrainedModel, got {kind}. {advice}"


def _require_interface(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    name = type(model).__name__
    reaches = [module for layer in layers.values() for module in layer.modules()]
    foreign = sorted(
        {
            type(module).__name__
            for module in model.modules()
            if re.search(r"Attention|Attn", type(module).__name__)
            and any(isinstance(child, nn.Linear) for child in module.children())
            and module not in reaches
            and not any(child in layers.values() for child in module.modules())
        }
    )
    if not layers or foreign:
        raise _no_interface(name, foreign)
    if not model._supports_flash_attn:
        raise _other_masks(name)


def _require_windows(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    for layer in layers.values() if has_windows(model) else ():
        if not any("sliding_window" in strings(code) for code in methods(type(layer))):
            raise ValueError(
                "layers must hand their sliding window to the attention function, got "
                f"{type(layer).__name__}, which leaves it to a 4-D mask. Set the config's "
                "layer_types to 'full_attention' if full attention is what you want."
            )


def _require_attention_only(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    found = set(getattr(model.config, "layer_types", None) or ()) - _LAYER_TYPES
    within = [module for layer in layers.values() for module in layer.modules()]
    for module in model.modules():
        kind = type(module).__name__
        mixes = _MIXER.search(kind) and not re.search(r"Norm|Mlp|MLP|Model$|For[A-Z]", kind)
        if mixes or (isinstance(module, nn.Conv1d) and module not in within):
            found.add(kind)
    if getattr(model.config, "trigram_input", False):
        found.add("trigram_input")  # MobileBERT concatenates the embeddings of adjacent tokens
    if found:
        raise ValueError(
            f"model must mix tokens by full or sliding-window attention only, got "
            f"{type(model).__name__} with {', '.join(sorted(found))}, through which packed "
            "documents would leak into one another. Train it unpatched, with one document per row."
        )


def _require_no_pattern(model: nn.Module) -> None:
    """Raises a ValueError if `use_bidirectional_attention` gives a model masks of its own."""
    if getattr(model.config, "use_bidirectional_attention", None) in (True, "all") and any(
        "or_mask_function" in strings(code)
        for module in model.modules()
        for code in methods(type(module))
    ):
        raise ValueError(
            f"use_bidirectional_attention must be False for {type(model).__name__}, got True in "
            "the model's config, which extends the masks by a pattern of its own. Train it "
            "unpatched, with attn_implementation='sdpa' and one document per row."
        )


def _require_keyword_arguments(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    names = {prefix for name in layers for prefix in itertools.accumulate(name.split("."), _dotted)}
    on_the_way = {model, *(model.get_submodule(name) for name in names)}
    for module in on_the_way:
        if type(module).__module__.startswith("torch.nn"):
            continue
        if not hands_keywords_on(module):
            raise ValueError(
                f"model must pass keyword arguments on to its attention, got "
                f"{type(model).__name__}, whose {type(module).__name__} drops them: document "
                "boundaries cannot reach the layers. Train it unpatched, with one document per "
                "row, or add **kwargs to that class."
            )


def _dotted(prefix: str, name: str) -> str:
    return f"{prefix}.{name}"


def has_windows(model: nn.Module) -> bool:
    """Returns whether layers of a model attend within sliding windows."""
    layer_types = getattr(model.config, "layer_types", None)
    if layer_types is not None:
        return "sliding_attention" in layer_types
    return getattr(model.config, "sliding_window", None) is not None and any(
        name.startswith("create_sliding_window")
        for module in model.modules()
        for code in methods(type(module))
        for name in code.co_names
    )


def counts_positions_itself(model: nn.Module) -> bool:
    """Returns whether a model computes position ids from padding_idx + 1 on, as RoBERTa does."""
    return any(
        uses_name(module, "create_position_ids_from_input_ids") for module in model.modules()
    )


def embeddings_read_mask(model: nn.Module) -> bool:
    """Returns whether a model's embeddings depend on a row's attention mask, as ESM's do."""
    return any(
        type(module).__name__.endswith("Embeddings") and "attention_mask" in parameters(module)
        for module in model.modules()
    )


def counts_positions_by_mask(model: nn.Module) -> bool:
    """Returns whether a model counts positions along a row's attention mask, as OPT does."""
    return any(
        {"attention_mask", "position_ids"} <= set(parameters(module))
        for module in model.modules()
        if isinstance(module, nn.Embedding)
    )
