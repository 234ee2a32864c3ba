"""Says how many experts compute each token, by the configurations of all families."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

_CHOSEN = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "num_selected_experts",
    "top_k_experts",
    "expert_top_k",
    "moe_top_k",
    "moe_topk",
    "moe_router_topk",
    "moe_k",
)
"""Names by which configurations state the number of experts of a token."""
_NESTED = ("text_config", "ffn_config", "moe_config")


def text_config(config: Any, layer: int | None = None) -> Any:
    """Returns the configuration of a model's text part, or of one of its layers.

    Args:
        config: Configuration of a transformers model, or None.
        layer: Number of a layer, if its own configuration is wanted. It is None for a layer that
            a heterogeneous configuration does not have.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if layer is None or not getattr(text, "is_heterogeneous", False):
        return text
    return text.per_layer_config[layer] if layer < text.num_hidden_layers else None


def experts_per_token(config: Any, layer: int = 0) -> int:
    """Returns the number of experts that compute each token; 1 for a model without experts.

    Args:
        config: Configuration of a transformers model.
        layer: Number of a layer, for families whose layers differ.
    """
    text = text_config(config, layer)
    for part in (text, *(getattr(text, name, None) for name in _NESTED)):
        for name in _CHOSEN:
            found = getattr(part, name, None)
            if isinstance(found, Sequence) and not isinstance(found, str):
                found = found[layer] if layer < len(found) else None
            if isinstance(found, int) and found > 0:
                return found
    return 1


def token_shares(module: nn.Module, chosen: int) -> dict[int, float]:
    """Returns the fraction of tokens that each weight of an expert multiplies, by the weight's id.

    All other weights of a module multiply every token.

    Args:
        module: A model or a layer.
        chosen: Number of experts that compute each token.
    """
    shares: dict[int, float] = {}
    for name, experts in module.named_modules():
        count = _count(name, experts)
        if count:
            shares |= {id(weight): min(1.0, chosen / count) for weight in experts.parameters()}
    return shares


def _count(name: str, module: nn.Module) -> int:
    """Returns the number of experts whose weights a module holds; 0 for any other module.

    Args:
        name: Dotted name of the module.
        module: The module: transformers' experts, whose weights are 3-D, or a list of MLPs.
    """
    own = name.rpartition(".")[2]
    if isinstance(module, nn.ModuleList):
        return len(module) if own == "experts" else 0
    # The name in the model tells shared experts: GraniteMoeSharedExperts are not.
    if not type(module).__name__.endswith("Experts") or own.startswith("shared"):
        return 0
    stacked = [len(weight) for weight in module.parameters() if weight.dim() == 3]
    return max(stacked, default=getattr(module, "num_experts", 0) or 0)
